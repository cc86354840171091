"""Sums blocks under secret multipliers: the part of a proof that touches every byte, at memory speed.

A block is read as 64-bit little-endian words, in rows of 1,024; word j of a row is two halves of 32 bits, w_(2j) its
lower one and w_(2j+1) its upper one. Each row has two sums modulo 2**64, under multipliers m_0 .. m_2048 that are
uniform in 64 bits and unknown to whoever may choose the bytes:

    first = sum(m_i * w_i)      second = sum(m_(i+1) * w_i)

This is multilinear hashing (Carter and Wegman 1979, "Universal classes of hash functions"; Lemire and Kaser 2014,
"Strongly universal string hashing is fast"), with words half as wide as the multipliers: modulo 2**64 an even
difference loses the upper bits of its multiplier, and a word as wide as the modulus could lose all but one of them
(Dietzfelbinger 1996, "Universal hashing and k-wise independent random variables via integer arithmetic without
primes"). That the second sum may have the first one's multipliers, moved by one, is due to Krawczyk (1994, "LFSR-based
hashing and authentication").

**The bound.** Let two rows differ, by integers d_i = w_i - w'_i with |d_i| < 2**32, and let d_n be the last that is not
0, divisible by 2**k and not by 2**(k+1); so k <= 31. Whatever the other multipliers are, m_n * d_n takes a given value
modulo 2**64 with probability 2**(k-64) or 0: the first sums are equal with probability 2**(k-64) at most. When
m_0 .. m_n are chosen, m_(n+1) is still to be, and stands in the second sums alone, times d_n: again 2**(k-64). Both are
equal with probability 2**(2k-128) at most: 2**-128 where d_n is odd, **2**-66 for every pattern of differences**, at
worst where only the topmost bit of that half differs (in bfloat16: a sign). Blocks that differ do so in some row.

It needs nothing but wrapping 64-bit products and sums of halves, so C, numpy and a device give the same bytes. The sums
are as secret as the multipliers: a proof shows them to nobody (`proof.py`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

ROW_WORDS: Final = 1024
SUM_BYTES: Final = 16
"""Of one row, or of what a block has beyond whole rows."""

Words = npt.NDArray[np.uint64]
_Summer = Callable[["Multipliers", Words], bytes]

_ROWS_AT_ONCE: Final = 16  # by numpy: what is made of them stays in cache, and is no mapping of its own
_LOWER_HALF: Final = np.uint64(0xFFFFFFFF)
_UPPER_HALF_SHIFT: Final = np.uint64(32)


@dataclass(frozen=True, eq=False, repr=False)
class Multipliers:
    """What a row is summed under: `even` is m_0, m_2 .. m_2048, uint64 `(ROW_WORDS + 1,)`, `odd` m_1, m_3 .. m_2047."""

    even: Words
    odd: Words

    @classmethod
    def of(cls, secret: bytes) -> Multipliers:
        """Draw them from a secret by SHAKE-256; the same for every process, device and numpy version."""
        stream = hashlib.shake_256(b"tandem.multipliers.1" + secret).digest(8 * (2 * ROW_WORDS + 1))
        drawn = np.frombuffer(stream, dtype="<u8").astype(np.uint64)
        multipliers = cls(drawn[0::2].copy(), drawn[1::2].copy())
        for table in (multipliers.even, multipliers.odd):
            table.setflags(write=False)
        return multipliers

    def sums(self, words: Words) -> bytes:
        """Return the sums of a block's rows: `SUM_BYTES` for each begun row, first and second, little-endian.

        `words` is uint64 `(words_per_block,)`, or `(num_pieces, words_per_piece)` with any stride between pieces: rows
        go on from one piece to the next, so a block's sums are the same in any pieces. Without Python's lock where the
        C library is built.
        """
        if words.dtype != np.uint64 or words.ndim not in (1, 2) or not words.size or words.strides[-1] != 8:
            raise ValueError(f"expected contiguous uint64 words of one block, got {words.dtype} {words.shape}")
        return _fastest()(self, words if words.flags.aligned else words.copy())


def sums_by_numpy(multipliers: Multipliers, words: Words) -> bytes:
    """The definition; what computes where no C compiler was."""
    words = words.reshape(-1)  # pieces are copied one behind the other
    num_whole = words.size // ROW_WORDS
    whole, rest = np.split(words, [num_whole * ROW_WORDS])
    parts = [
        whole.reshape(-1, ROW_WORDS)[start : start + _ROWS_AT_ONCE] for start in range(0, num_whole, _ROWS_AT_ONCE)
    ]
    return b"".join(_sum_rows(multipliers, rows) for rows in [*parts, rest.reshape(1, -1)] if rows.size)


def _sum_rows(multipliers: Multipliers, rows: Words) -> bytes:
    lower, upper = rows & _LOWER_HALF, rows >> _UPPER_HALF_SHIFT
    size = rows.shape[1]
    even, odd, following = multipliers.even[:size], multipliers.odd[:size], multipliers.even[1 : size + 1]
    sums = np.empty((len(rows), 2), dtype="<u8")
    sums[:, 0] = np.einsum("ij,j->i", lower, even) + np.einsum("ij,j->i", upper, odd)
    sums[:, 1] = np.einsum("ij,j->i", lower, odd) + np.einsum("ij,j->i", upper, following)
    return sums.tobytes()


def sums_by_c(path: Path) -> _Summer:
    """Load the library, built from row_sums.c. Raises OSError, AttributeError where it is none of ours."""
    function = ctypes.CDLL(str(path)).tandem_row_sums_2
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, size, size, size, pointer, pointer, pointer]
    function.restype = None

    def sums(multipliers: Multipliers, words: Words) -> bytes:
        into = ctypes.create_string_buffer(-(-words.size // ROW_WORDS) * SUM_BYTES)
        pieces = (1, 0, words.size) if words.ndim == 1 else (len(words), words.strides[0], words.shape[1])
        function(_address(words), *pieces, _address(multipliers.even), _address(multipliers.odd), into)
        return into.raw

    return sums


def library_path() -> Path | None:
    """Where the built library lies; None where it is not built."""
    names = [f"_row_sums{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    paths = [Path(__file__).with_name(name) for name in names]
    return next((path for path in paths if path.exists()), None)


@functools.cache
def _fastest() -> _Summer:
    """Choose once: C where it is built and computes what numpy does."""
    path = library_path()
    if path is None:
        return sums_by_numpy
    try:
        by_c = sums_by_c(path)
    except (OSError, AttributeError) as error:
        logger.warning("%s does not load, blocks are summed by numpy: %s", path.name, error)
        return sums_by_numpy
    multipliers = Multipliers.of(b"trial")
    # Four rows, which it sums at once, then one whole one and a part of one; and rows that go on in another piece.
    words = np.arange(6 * ROW_WORDS - 5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    pieces = words.reshape(7, -1)[:, 1:]
    if any(by_c(multipliers, each) != sums_by_numpy(multipliers, each) for each in (words, pieces)):
        logger.warning("%s gives wrong sums here, blocks are summed by numpy", path.name)
        return sums_by_numpy
    return by_c


def is_compiled() -> bool:
    """Whether the C library computes the sums in this process."""
    return _fastest() is not sums_by_numpy


def _address(array: Words) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
