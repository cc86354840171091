"""Computes payload digests, which prove that a block arrived as it was computed.

The digest is a multilinear hash: a block read as little-endian 64-bit words w_0, w_1, ... gives sum(m_j * w_j) mod
2**64 with fixed odd multipliers m_j (Carter and Wegman 1979, "Universal classes of hash functions"; Lemire and Kaser
2014, "Strongly universal string hashing is fast"). It needs nothing but wrapping 64-bit integer arithmetic, so a CPU
and a GPU compute the same value, each at memory speed.

What it is for: torn, lost, late and misplaced writes. Every error confined to one word changes the digest, because the
multipliers are odd; unrelated contents collide with probability near 2**-64. What it is not: a cryptographic hash.
Whoever may choose the bytes can make two blocks with equal digests, and so can faults that touch nothing but the
topmost bits of several words at once (m * 2**63 does not depend on m: an even number of flipped top bits goes unseen).
A forger is kept out by authentication of peers, not by this.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1

# SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), as a function of a counter.
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_SEED = 0x74616E64656D2E31  # "tandem.1"


@functools.lru_cache(maxsize=16)
def multipliers(num_words: int) -> npt.NDArray[np.int64]:
    """Return the multipliers of words 0 .. num_words - 1: int64 `(num_words,)`, all odd, read-only.

    The table for fewer words is a prefix of the table for more. It is the same for every process, device and numpy
    version.
    """
    if num_words < 1:
        raise ValueError(f"a block must have at least one 8-byte word, not {num_words}")
    z = np.arange(1, num_words + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(_SEED)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    table = ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)
    table.setflags(write=False)
    return table


def digest_rows(words: npt.NDArray[np.int64]) -> list[int]:
    """Return one digest per row, 0 .. 2**64 - 1.

    `words` is int64 `(num_blocks, words_per_block)`, strided or contiguous: each block's bytes as little-endian words.
    Sums and products wrap around on purpose. A device computes the same by an int64 multiply and sum; mask its signed
    result.
    """
    if words.dtype != np.int64 or words.ndim != 2:
        raise ValueError(
            f"expected int64 words of shape (num_blocks, words_per_block), got {words.dtype} {words.shape}"
        )
    sums = np.einsum("ij,j->i", words, multipliers(words.shape[1]))
    return [int(value) & _MASK for value in sums]
