"""Defines block memory: one pool, addressed by block id.

Transports move bytes between pools, and proofs are made of them, through this interface; neither knows torch.
The CPU pool is here; the CUDA one is in `services.engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block.row_sums import Multipliers

_PAGE_BYTES = 4096


class BlockMemory(Protocol):
    """One whole pool `[num_blocks, block_bytes]`, contiguous, allocated for the life of the process."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    @property
    def block_bytes(self) -> int:
        """Size of one block; a multiple of 8."""

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda:N"`."""

    @property
    def address(self) -> int:
        """Address of block 0; block `i` starts `i * block_bytes` after it."""

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows (`Multipliers.sums`), in the order given."""


class HostMemory:
    """A pool in main memory, over an array that the caller owns and keeps alive: uint8 `(num_blocks, block_bytes)`."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        if array.dtype != np.uint8 or array.ndim != 2 or not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError(
                f"expected a writable, contiguous uint8 (num_blocks, block_bytes), got {array.dtype} {array.shape}"
            )
        num_blocks, block_bytes = array.shape
        if num_blocks < 1 or block_bytes < 8 or block_bytes % 8:
            raise ValueError(f"expected at least one block of a multiple of 8 bytes, got {num_blocks} of {block_bytes}")
        self.array = array
        self._words = array.view("<u8")

    @classmethod
    def allocate(cls, num_blocks: int, block_bytes: int) -> HostMemory:
        """Allocate a zeroed, page-aligned pool (alignment keeps RDMA registration and CPU kernels happy)."""
        raw = np.zeros(num_blocks * block_bytes + _PAGE_BYTES, dtype=np.uint8)
        skip = -raw.ctypes.data % _PAGE_BYTES
        return cls(raw[skip : skip + num_blocks * block_bytes].reshape(num_blocks, block_bytes))

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return int(self.array.shape[0])

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        return int(self.array.shape[1])

    @property
    def device(self) -> str:
        """Always `"cpu"`."""
        return "cpu"

    @property
    def address(self) -> int:
        """Address of block 0."""
        return int(self.array.ctypes.data)

    def view(self, block_id: int) -> npt.NDArray[np.uint8]:
        """Return block `block_id` as uint8 `(block_bytes,)`; writing to it writes the pool. Raises IndexError."""
        self._check(block_id)
        row: npt.NDArray[np.uint8] = self.array[block_id]
        return row

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows, in the order given. Raises IndexError."""
        sums: list[bytes] = []
        for block_id in block_ids:  # one by one: gathering scattered blocks first would copy them
            self._check(block_id)
            sums.append(multipliers.sums(self._words[block_id]))
        return sums

    def _check(self, block_id: int) -> None:
        # numpy would take -1 as the last block.
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside this pool of {self.num_blocks}")
