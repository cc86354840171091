"""Allocates the KV cache, and shows it to the block store: each block is one run of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.block import BlockMemory, HostMemory
from services.engine.tensor_memory import DeviceMemory

_ALIGNMENT_BYTES = 2 << 20  # a huge page: fewer TLB misses for attention, fewer entries for RDMA registration


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
    blocks = as_bytes(kv_cache)
    return HostMemory(blocks.numpy()) if kv_cache.device.type == "cpu" else DeviceMemory(blocks[None])


def as_bytes(kv_cache: Tensor) -> Tensor:
    """View the cache as uint8 `[num_blocks, block_bytes]`."""
    return kv_cache.view(kv_cache.shape[0], -1).view(torch.uint8)
