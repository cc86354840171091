"""Marks words of what is being read, one in 64 KiB, so that it shows whether bytes come: as they do, marks go."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

STEP_BYTES: Final = 64 * 1024
STEP_WORDS: Final = STEP_BYTES // 8
# Small and finite in every type that a cache may have: a block whose read came to nothing goes back to the pool with
# its marks, and where its last tokens are not computed yet, attention multiplies what lies there by 0.
MARK: Final = np.uint64(0x3A5C_1F3B_3A5D_1E3C)

Marked = list[npt.NDArray[np.uint64]]


def mark_run(words: npt.NDArray[np.uint64]) -> Marked:
    """Mark every so many words of a run of bytes, `(num_words,)`, and its last one."""
    return _mark(words[STEP_WORDS - 1 :: STEP_WORDS], words[-1:])


def mark_pieces(words: npt.NDArray[np.uint64], number: int) -> Marked:
    """The same of neighbouring blocks in pieces, `(num_pieces, num_blocks, piece_words)`: of each piece, or of some.

    The first pieces of all runs may come before any second one, so each run of a read, by its `number`, has others.
    """
    every = max(1, STEP_WORDS // (words.shape[1] * words.shape[2]))
    some = words[min((every - 1 + number) % every, len(words) - 1) :: every]
    return _mark(some[:, :, STEP_WORDS - 1 :: STEP_WORDS], some[:, -1, -1])


def num_left(marked: Marked) -> int:
    """Return how many marks are there still."""
    return sum(int(np.count_nonzero(words == MARK)) for words in marked)


def _mark(*marked: npt.NDArray[np.uint64]) -> Marked:
    for words in marked:
        words[...] = MARK
    return list(marked)
