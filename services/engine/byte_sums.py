"""Digests of weights that cost no more than reading them: rows are summed, and the sums go into BLAKE2b."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import public_multipliers

_BYTES_AT_ONCE = 1 << 20


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def add_bytes(
    digest: _Digest, data: npt.NDArray[np.uint8], tell: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Have a digest depend on every bit of `data`, uint8 `(num_bytes,)`; `tell` hears of each part's bytes.

    The sums are under multipliers that everybody knows (`kvstore.block.row_sums`).
    """
    for start in range(0, len(data), _BYTES_AT_ONCE):
        piece = data[start : start + _BYTES_AT_ONCE]
        num_bytes = len(piece)
        if num_bytes % 8:
            piece = np.concatenate([piece, np.zeros(-num_bytes % 8, dtype=np.uint8)])
        digest.update(public_multipliers().sums(np.ascontiguousarray(piece).view("<u8")))
        tell(num_bytes)
