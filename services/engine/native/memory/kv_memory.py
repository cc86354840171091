"""Shows the KV cache to the block store: blocks of bytes, with digests, on their device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.block import BlockMemory, HostMemory, multipliers

_ALIGNMENT_BYTES = 2 << 20  # a huge page: fewer TLB misses for attention, fewer entries for RDMA registration
_MASK = (1 << 64) - 1
_BLOCKS_AT_ONCE = 16  # bounds what digesting allocates on the device


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
        # A copy: torch does not take read-only arrays.
        self._multipliers = torch.from_numpy(multipliers(self._words.shape[1]).copy()).to(kv_cache.device)

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

    def digests(self, block_ids: Sequence[int]) -> list[int]:
        """Return the payload digest of each block, equal to what `kvstore.block.digest` computes. Raises IndexError.

        Waits for the device: whatever was launched on the current stream before is included.
        """
        for block_id in block_ids:
            self._check(block_id)
        sums: list[int] = []
        for start in range(0, len(block_ids), _BLOCKS_AT_ONCE):
            chosen = torch.tensor(block_ids[start : start + _BLOCKS_AT_ONCE], device=self._words.device)
            # int64 products and sums wrap around, which is arithmetic modulo 2**64.
            sums += (self._words[chosen] * self._multipliers).sum(dim=1).tolist()
        return [value & _MASK for value in sums]

    def _check(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside this pool of {self.num_blocks}")


def as_bytes(kv_cache: Tensor) -> Tensor:
    """View the cache as uint8 `[num_blocks, block_bytes]`."""
    return kv_cache.view(kv_cache.shape[0], -1).view(torch.uint8)
