"""Defines block memory: one pool, addressed by block id.

Transports move bytes between pools, and proofs are made of them, through this interface; neither knows torch.
Those in main memory are here; the one on a device is in `services.engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block.geometry import Geometry
from kvstore.block.row_sums import Multipliers, Words

_PAGE_BYTES = 4096

Bytes = npt.NDArray[np.uint8]


class Staging(Protocol):
    """A run of bytes on a memory's device, uint8 `(num_bytes,)`: an array of numpy, or a tensor."""

    def __getitem__(self, part: slice, /) -> Staging:
        """Return a part of it."""


class BlockMemory(Protocol):
    """One whole pool of blocks of equal size, allocated for the life of the process.

    A block's bytes are those of its pieces, one behind the other: so they are summed, gathered, and sent.
    """

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
    def geometry(self) -> Geometry:
        """Where the blocks lie."""

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows (`Multipliers.sums`), in the order given."""

    def staging(self, num_blocks: int) -> Staging:
        """Return a new buffer for so many blocks, one behind the other, on this device."""

    def gather(self, first_block: int, staging: Staging) -> None:
        """Fill such a buffer with neighbouring blocks; what is sent where they are no run of bytes themselves."""

    def scatter(self, first_block: int, staging: Staging) -> None:
        """Write neighbouring blocks from such a buffer."""


class _InMainMemory:
    """What memories here have in common; `_pieces` is uint8 `(num_blocks, num_pieces, piece_bytes)`, a view."""

    def __init__(self, pieces: Bytes) -> None:
        num_blocks, num_pieces, piece_bytes = pieces.shape
        block_stride, piece_stride, _ = pieces.strides
        self.geometry = Geometry(
            int(pieces.ctypes.data),
            num_blocks,
            num_pieces,
            piece_bytes,
            piece_stride if num_pieces > 1 else 0,
            block_stride if num_blocks > 1 else max(block_stride, piece_bytes),
        )
        self._pieces = pieces
        words: Words = pieces.view("<u8")
        self._words = words[:, 0] if num_pieces == 1 else words

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.geometry.num_blocks

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        return self.geometry.block_bytes

    @property
    def device(self) -> str:
        """Always `"cpu"`."""
        return "cpu"

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows, in the order given. Raises IndexError."""
        sums: list[bytes] = []
        for block_id in block_ids:  # one by one: gathering scattered blocks first would copy them
            self._check(block_id)
            sums.append(multipliers.sums(self._words[block_id]))
        return sums

    def staging(self, num_blocks: int) -> Bytes:
        """Return a new buffer, uint8 `(num_blocks * block_bytes,)`."""
        return np.empty(num_blocks * self.block_bytes, np.uint8)

    def gather(self, first_block: int, staging: Staging) -> None:
        """Fill a buffer with neighbouring blocks. Raises IndexError."""
        pieces, buffer = self._pair(first_block, staging)
        np.copyto(buffer, pieces)

    def scatter(self, first_block: int, staging: Staging) -> None:
        """Write neighbouring blocks from a buffer. Raises IndexError."""
        pieces, buffer = self._pair(first_block, staging)
        np.copyto(pieces, buffer)

    def _pair(self, first_block: int, staging: Staging) -> tuple[Bytes, Bytes]:
        assert isinstance(staging, np.ndarray)
        buffer = staging.reshape(-1, *self._pieces.shape[1:])
        self._check(first_block)
        self._check(first_block + len(buffer) - 1)
        return self._pieces[first_block : first_block + len(buffer)], buffer

    def _check(self, block_id: int) -> None:
        # numpy would take -1 as the last block.
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside this pool of {self.num_blocks}")


class HostMemory(_InMainMemory):
    """Contiguous blocks over an array that the caller owns and keeps alive: uint8 `(num_blocks, block_bytes)`."""

    def __init__(self, array: Bytes) -> None:
        if array.dtype != np.uint8 or array.ndim != 2 or not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError(
                f"expected a writable, contiguous uint8 (num_blocks, block_bytes), got {array.dtype} {array.shape}"
            )
        num_blocks, block_bytes = array.shape
        if num_blocks < 1 or block_bytes < 8 or block_bytes % 8:
            raise ValueError(f"expected at least one block of a multiple of 8 bytes, got {num_blocks} of {block_bytes}")
        super().__init__(array.reshape(num_blocks, 1, block_bytes))
        self.array = array

    @classmethod
    def allocate(cls, num_blocks: int, block_bytes: int) -> HostMemory:
        """Allocate a zeroed, page-aligned pool (alignment keeps RDMA registration and CPU kernels happy)."""
        raw = np.zeros(num_blocks * block_bytes + _PAGE_BYTES, dtype=np.uint8)
        skip = -raw.ctypes.data % _PAGE_BYTES
        return cls(raw[skip : skip + num_blocks * block_bytes].reshape(num_blocks, block_bytes))

    def view(self, block_id: int) -> Bytes:
        """Return block `block_id` as uint8 `(block_bytes,)`; writing to it writes the pool. Raises IndexError."""
        self._check(block_id)
        row: Bytes = self.array[block_id]
        return row


class PieceMemory(_InMainMemory):
    """Blocks in pieces over an array that the caller keeps alive: uint8 `(num_pieces, num_blocks, piece_bytes)`.

    Any strides but the last axis's, which is 1: a view of an engine's own storage, whose layers are one behind the
    other. Raises ValueError for anything else, and where pieces overlap.
    """

    def __init__(self, array: Bytes) -> None:
        if array.dtype != np.uint8 or array.ndim != 3 or not array.flags.writeable or not array.size:
            raise ValueError(
                f"expected writable uint8 (num_pieces, num_blocks, piece_bytes), got {array.dtype} {array.shape}"
            )
        if array.strides[2] != 1 or array.shape[2] % 8:
            raise ValueError(
                f"expected pieces of neighbouring bytes, a multiple of 8, got {array.shape}, strides {array.strides}"
            )
        super().__init__(array.transpose(1, 0, 2))
        self.array = array

    def view(self, block_id: int) -> Bytes:
        """Return block `block_id` as uint8 `(num_pieces, piece_bytes)`; writing to it writes the pool."""
        self._check(block_id)
        block: Bytes = self.array[:, block_id]
        return block
