"""Copies between the paged KV pool and the slots of the host-memory tier; owns the slots' memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.block import BlockMemory, HostMemory, ProofKey
from kvstore.pool import BlockCopier, HostTier
from services.engine.native.memory.kv_memory import allocate_kv_cache, as_bytes


def open_host_tier(kv_cache: Tensor, memory: BlockMemory, num_slots: int, proof_key: ProofKey) -> HostTier:
    """A tier of so many slots beside the cache `[num_blocks, ...]`, which is `memory`; takes all its memory at once.

    Beside a GPU it is page-locked: the device copies into pageable memory at a fraction of the speed.
    """
    shape = (num_slots, memory.block_bytes)
    copier: BlockCopier
    if kv_cache.device.type == "cpu":
        slots = allocate_kv_cache(shape, torch.uint8, kv_cache.device).zero_()
        copier = MemoryCopier(kv_cache, slots)
    else:
        slots = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        copier = DeviceCopier(kv_cache, slots)
    return HostTier(HostMemory(slots.numpy()), memory, copier, proof_key)


class MemoryCopier:
    """Both are in main memory. By numpy: torch would open a team of compute threads for each thread that copies."""

    def __init__(self, kv_cache: Tensor, slots: Tensor) -> None:
        self._blocks = as_bytes(kv_cache).numpy()
        self._slots = slots.numpy()

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copy paged blocks into slots."""
        for block_id, slot in zip(block_ids, slots, strict=True):
            np.copyto(self._slots[slot], self._blocks[block_id])

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """Copy slots into paged blocks."""
        for slot, block_id in zip(slots, block_ids, strict=True):
            np.copyto(self._blocks[block_id], self._slots[slot])


class DeviceCopier:
    """The cache is a GPU's. A block is contiguous on both sides, so its copy is one DMA and needs no kernel."""

    def __init__(self, kv_cache: Tensor, slots: Tensor) -> None:
        self._blocks = as_bytes(kv_cache)
        self._slots = slots
        self._compute = torch.cuda.current_stream(kv_cache.device)
        self._stream = torch.cuda.Stream(kv_cache.device)  # type: ignore[no-untyped-call]

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copy paged blocks into slots, after all that was launched before."""
        with torch.cuda.stream(self._compute):
            for block_id, slot in zip(block_ids, slots, strict=True):
                self._slots[slot].copy_(self._blocks[block_id], non_blocking=True)
        self._compute.synchronize()

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """Copy slots into paged blocks beside the step in progress, but not before those that used these blocks."""
        self._stream.wait_stream(self._compute)
        with torch.cuda.stream(self._stream):
            for slot, block_id in zip(slots, block_ids, strict=True):
                self._blocks[block_id].copy_(self._slots[slot], non_blocking=True)
        self._stream.synchronize()
