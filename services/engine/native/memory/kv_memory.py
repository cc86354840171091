"""Shows the KV cache to the block store: blocks of bytes, summed where they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.block import ROW_WORDS, BlockMemory, HostMemory, Multipliers

_ALIGNMENT_BYTES = 2 << 20  # a huge page: fewer TLB misses for attention, fewer entries for RDMA registration
_LOWER_HALF = (1 << 32) - 1
_BLOCKS_AT_ONCE = 16  # bounds what summing allocates on the device


def allocate_kv_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros of `shape`; on CPU aligned to 2 MiB, owned by the tensor, backed as they are used."""
    if device.type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = np.zeros(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT_BYTES
    return torch.from_numpy(raw[skip : skip + num_bytes]).view(dtype).view(tuple(shape))


def block_memory(kv_cache: Tensor) -> BlockMemory:
    """Return the cache `[num_blocks, ...]` as memory that transports can use, without a copy."""
    if kv_cache.device.type == "cpu":
        return HostMemory(as_bytes(kv_cache).numpy())
    return DeviceMemory(kv_cache)


class DeviceMemory:
    """A pool in a GPU's memory (or anywhere that torch has int64 arithmetic). Keeps the cache alive."""

    def __init__(self, kv_cache: Tensor) -> None:
        self._blocks = as_bytes(kv_cache)
        self._words = self._blocks.view(torch.int64)
        self._tables: dict[Multipliers, tuple[Tensor, Tensor]] = {}

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self._blocks.shape[0]

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        return self._blocks.shape[1]

    @property
    def device(self) -> str:
        """`"cuda:N"`."""
        return str(self._blocks.device)

    @property
    def address(self) -> int:
        """Device address of block 0."""
        return self._blocks.data_ptr()

    def view(self, block_id: int) -> Tensor:
        """Return block `block_id` as uint8 `[block_bytes]`, which has `__cuda_array_interface__`. Raises IndexError."""
        self._check(block_id)
        return self._blocks[block_id]

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows, the bytes that `Multipliers.sums` gives on a CPU. Raises IndexError.

        Waits for the device: whatever was launched on the current stream before is included.
        """
        for block_id in block_ids:
            self._check(block_id)
        even, odd = self._on_device(multipliers)
        num_words = self._words.shape[1]
        num_whole = num_words // ROW_WORDS * ROW_WORDS
        sums: list[bytes] = []
        for start in range(0, len(block_ids), _BLOCKS_AT_ONCE):
            chosen = torch.tensor(block_ids[start : start + _BLOCKS_AT_ONCE], device=self._words.device)
            words = self._words[chosen]
            parts = [words[:, :num_whole].reshape(len(words), -1, ROW_WORDS)] if num_whole else []
            parts += [words[:, None, num_whole:]] if num_whole < num_words else []
            rows = torch.cat([_sum_rows(part, even, odd) for part in parts], dim=1)
            sums += [row.tobytes() for row in rows.cpu().numpy()]
        return sums

    def _on_device(self, multipliers: Multipliers) -> tuple[Tensor, Tensor]:
        if multipliers not in self._tables:
            tables = (torch.from_numpy(table.view(np.int64).copy()) for table in (multipliers.even, multipliers.odd))
            even, odd = (table.to(self._words.device) for table in tables)
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


def as_bytes(kv_cache: Tensor) -> Tensor:
    """View the cache as uint8 `[num_blocks, block_bytes]`."""
    return kv_cache.view(kv_cache.shape[0], -1).view(torch.uint8)
