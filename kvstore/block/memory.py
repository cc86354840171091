"""Defines block memory: one pool, addressed by block id.

Transports move bytes between pools, and proofs are made of them, through this interface; neither knows torch.
Those in main memory are here; the one on a device is in `services.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block.geometry import Geometry, Region
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

    @property
    def can_be_shown(self) -> bool:
        """Whether a library can give this memory's handle to peers; not where another process has given it to us."""

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows (`Multipliers.sums`), in the order given."""

    def staging(self, num_blocks: int) -> Staging:
        """Return a new buffer for so many blocks, one behind the other, on this device."""

    def gather(self, first_block: int, staging: Staging) -> None:
        """Fill such a buffer with neighbouring blocks; what is sent where they are no run of bytes themselves."""

    def scatter(self, first_block: int, staging: Staging) -> None:
        """Write neighbouring blocks from such a buffer."""


class _InMainMemory:
    """What memories here have in common.

    `_regions` are views, uint8 `(num_blocks, num_layers, piece_bytes)`, alike; a block's pieces take turns in them.
    """

    def __init__(self, regions: Sequence[Bytes]) -> None:
        first = regions[0]
        if any(each.shape != first.shape or each.strides != first.strides for each in regions):
            raise ValueError(f"expected regions alike, got {[(each.shape, each.strides) for each in regions]}")
        places = [Region(int(each.ctypes.data)) for each in regions]
        self.geometry = Geometry.of_views(places, first.shape, first.strides)
        self._regions = regions

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

    @property
    def can_be_shown(self) -> bool:
        """Always: pages of main memory are read by their process's addresses, whoever shares them."""
        return True

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows, in the order given. Raises IndexError."""
        sums: list[bytes] = []
        for block_id in block_ids:  # one by one: gathering scattered blocks first would copy them
            self._check(block_id)
            sums.append(multipliers.sums(self._words(block_id)))
        return sums

    def _words(self, block_id: int) -> Words:
        """A block's, as they are to be summed: where they are, or, from several regions, as a copy."""
        parts = [region[block_id].view("<u8") for region in self._regions]
        if len(parts) > 1:
            parts = [np.stack(parts, axis=1).reshape(1, -1)]
        words: Words = parts[0]
        return words[0] if len(words) == 1 else words

    def staging(self, num_blocks: int) -> Bytes:
        """Return a new buffer, uint8 `(num_blocks * block_bytes,)`."""
        return np.empty(num_blocks * self.block_bytes, np.uint8)

    def gather(self, first_block: int, staging: Staging) -> None:
        """Fill a buffer with neighbouring blocks. Raises IndexError."""
        for region, part in self._pairs(first_block, staging):
            np.copyto(part, region)

    def scatter(self, first_block: int, staging: Staging) -> None:
        """Write neighbouring blocks from a buffer. Raises IndexError."""
        for region, part in self._pairs(first_block, staging):
            np.copyto(region, part)

    def _pairs(self, first_block: int, staging: Staging) -> Iterator[tuple[Bytes, Bytes]]:
        """Each region's part of neighbouring blocks, and of a buffer for them."""
        assert isinstance(staging, np.ndarray)
        _, num_layers, piece_bytes = self._regions[0].shape
        buffer = staging.reshape(-1, num_layers, len(self._regions), piece_bytes)
        end = first_block + len(buffer)
        self._check(first_block)
        self._check(end - 1)
        return ((region[first_block:end], buffer[:, :, rank]) for rank, region in enumerate(self._regions))

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
        super().__init__([array.reshape(num_blocks, 1, block_bytes)])
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
    """Blocks in pieces over arrays that the caller keeps alive: uint8 `(num_layers, num_blocks, piece_bytes)`.

    Any strides but the last axis's, which is 1: a view of an engine's own storage, whose layers are one behind the
    other; of several ranks, one each, alike. Raises ValueError for anything else, and where pieces overlap.
    """

    def __init__(self, *arrays: Bytes) -> None:
        for array in arrays:
            if array.dtype != np.uint8 or array.ndim != 3 or not array.flags.writeable or not array.size:
                raise ValueError(
                    f"expected writable uint8 (num_layers, num_blocks, piece_bytes), got {array.dtype} {array.shape}"
                )
            if array.strides[2] != 1 or array.shape[2] % 8:
                raise ValueError(
                    f"expected pieces of neighbouring bytes, a multiple of 8; got {array.shape} by {array.strides}"
                )
        super().__init__([array.transpose(1, 0, 2) for array in arrays])

    def view(self, block_id: int, region: int = 0) -> Bytes:
        """Return a region's part of a block as uint8 `(num_layers, piece_bytes)`; writing to it writes the pool."""
        self._check(block_id)
        part: Bytes = self._regions[region][block_id]
        return part
