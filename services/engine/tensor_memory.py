"""Shows an engine's KV cache to the block store: blocks of bytes, summed where they are, in one piece or in several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.block import ROW_WORDS, BlockMemory, Geometry, Multipliers, PieceMemory, Region, Staging
from services.machine import Gpu

_LOWER_HALF = (1 << 32) - 1
_BLOCKS_AT_ONCE = 16  # bounds what summing allocates on the device


def tensor_memory(*caches: Tensor, is_mapped: bool = False) -> BlockMemory:
    """Return a view of a cache, uint8 `[num_layers, num_blocks, piece_bytes]`, as memory that transports can use.

    Of several ranks: a view of each, alike; a block's pieces take turns in them. `is_mapped`: other processes have
    allocated it. Without a copy; the cache's owner keeps it alive. Raises ValueError where it cannot be that.
    """
    is_here = caches[0].device.type == "cpu"
    return PieceMemory(*(each.numpy() for each in caches)) if is_here else DeviceMemory(*caches, is_mapped=is_mapped)


def gpu_of(device: str) -> Gpu | None:
    """What torch knows of a GPU, None for a CPU."""
    if not device.startswith("cuda"):
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu(device, properties.total_memory, model=properties.name)


class DeviceMemory:
    """A pool in the memory of GPUs (or anywhere that torch has int64 arithmetic). Keeps the cache alive.

    What it sums and stages is on the first one.
    """

    def __init__(self, *caches: Tensor, is_mapped: bool = False) -> None:
        """`caches`, alike: uint8 `[num_layers, num_blocks, piece_bytes]`, the last stride 1, the others any.

        `is_mapped`: other processes have allocated them.
        """
        first = caches[0]
        for cache in caches:
            if cache.dtype != torch.uint8 or cache.dim() != 3 or cache.stride(2) != 1:
                raise ValueError(
                    f"expected uint8 [num_layers, num_blocks, piece_bytes], got {cache.dtype} {list(cache.shape)}"
                )
            if cache.shape != first.shape or cache.stride() != first.stride():
                raise ValueError(f"expected caches alike, got {list(first.shape)} and {list(cache.shape)}")
        places = [Region(cache.data_ptr(), cache.device.index or 0) for cache in caches]
        self._regions = [cache.transpose(0, 1) for cache in caches]
        self.geometry = Geometry.of_views(places, self._regions[0].shape, self._regions[0].stride())
        self._device = first.device
        self.can_be_shown = not is_mapped
        self._tables: dict[Multipliers, tuple[Tensor, Tensor]] = {}

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
        """`"cuda:N"`."""
        return str(self._device)

    def view(self, block_id: int, region: int = 0) -> Tensor:
        """Return a region's part of a block as uint8 `[num_layers, piece_bytes]`; writing to it writes the pool."""
        self._check(block_id)
        return self._regions[region][block_id]

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows, the bytes that `Multipliers.sums` gives on a CPU. Raises IndexError.

        Waits for the device: whatever was launched on the current stream before is included.
        """
        for block_id in block_ids:
            self._check(block_id)
        even, odd = self._on_device(multipliers)
        num_words = self.block_bytes // 8
        num_whole = num_words // ROW_WORDS * ROW_WORDS
        sums: list[bytes] = []
        for start in range(0, len(block_ids), _BLOCKS_AT_ONCE):
            chosen = torch.tensor(block_ids[start : start + _BLOCKS_AT_ONCE])
            parts = [region[chosen.to(region.device)].to(self._device) for region in self._regions]
            words = torch.stack(parts, dim=2).view(torch.int64).reshape(len(chosen), num_words)
            whole = [words[:, :num_whole].reshape(len(words), -1, ROW_WORDS)] if num_whole else []
            rest = [words[:, None, num_whole:]] if num_whole < num_words else []
            rows = torch.cat([_sum_rows(part, even, odd) for part in (*whole, *rest)], dim=1)
            sums += [row.tobytes() for row in rows.cpu().numpy()]
        return sums

    def staging(self, num_blocks: int) -> Tensor:
        """Return a new buffer, uint8 `[num_blocks * block_bytes]`, which has `__cuda_array_interface__`."""
        return torch.empty(num_blocks * self.block_bytes, dtype=torch.uint8, device=self._device)

    def gather(self, first_block: int, staging: Staging) -> None:
        """Fill a buffer with neighbouring blocks. Waits for the device. Raises IndexError."""
        for region, part in self._pairs(first_block, staging):
            part.copy_(region)
        self._wait()

    def scatter(self, first_block: int, staging: Staging) -> None:
        """Write neighbouring blocks from a buffer. Waits for the device. Raises IndexError."""
        for region, part in self._pairs(first_block, staging):
            region.copy_(part)
        self._wait()

    def _pairs(self, first_block: int, staging: Staging) -> Iterator[tuple[Tensor, Tensor]]:
        """Each region's part of neighbouring blocks, and of a buffer for them."""
        assert isinstance(staging, Tensor)
        _, num_layers, piece_bytes = self._regions[0].shape
        buffer = staging.view(-1, num_layers, len(self._regions), piece_bytes)
        end = first_block + len(buffer)
        self._check(first_block)
        self._check(end - 1)
        return ((region[first_block:end], buffer[:, :, rank]) for rank, region in enumerate(self._regions))

    def _wait(self) -> None:
        for device in {region.device for region in self._regions if region.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # no stream of UCX's knows of ours

    def _on_device(self, multipliers: Multipliers) -> tuple[Tensor, Tensor]:
        if multipliers not in self._tables:
            tables = (torch.from_numpy(table.view(np.int64).copy()) for table in (multipliers.even, multipliers.odd))
            even, odd = (table.to(self._device) for table in tables)
            self._tables[multipliers] = even, odd
        return self._tables[multipliers]

    def _check(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside this pool of {self.num_blocks}")


def _sum_rows(words: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Sum rows `[.., num_rows, num_words]`: `[.., num_rows, 2]`. int64 wraps around, which is modulo 2**64."""
    size = words.shape[-1]
    lower, upper = words & _LOWER_HALF, (words >> 32) & _LOWER_HALF
    first = (lower * even[:size] + upper * odd[:size]).sum(dim=-1)
    second = (lower * odd[:size] + upper * even[1 : size + 1]).sum(dim=-1)
    return torch.stack([first, second], dim=-1)
