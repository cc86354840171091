"""The cache as memory for transports: the same bytes, aligned, with the digests that peers compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore.block import HostMemory
from kvstore.block.digest import digest_rows
from services.engine.native.memory.kv_memory import DeviceMemory, allocate_kv_cache, block_memory

SHAPE = (40, 3, 2, 2, 16, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_cache_is_zeroed_aligned_and_shared_with_its_memory(dtype: torch.dtype) -> None:
    kv_cache = allocate_kv_cache(SHAPE, dtype, torch.device("cpu"))
    memory = block_memory(kv_cache)
    assert isinstance(memory, HostMemory)
    assert kv_cache.shape == SHAPE
    assert kv_cache.is_contiguous()
    assert kv_cache.count_nonzero() == 0
    assert kv_cache.data_ptr() % 4096 == 0
    assert (memory.num_blocks, memory.block_bytes) == (40, kv_cache[0].nbytes)
    assert memory.address == kv_cache.data_ptr()
    kv_cache[7] = 1.5
    assert bytes(memory.view(7)) == kv_cache[7].contiguous().view(torch.uint8).numpy().tobytes()
    memory.view(8)[:] = memory.view(7)
    assert bool((kv_cache[8] == 1.5).all())


def test_device_digests_are_those_of_the_block_store() -> None:
    generator = torch.Generator().manual_seed(0)
    kv_cache = torch.randn(SHAPE, generator=generator).to(torch.bfloat16)
    ids = [39, 0, 7, 7, *range(30)]
    words = kv_cache.view(40, -1).view(torch.int64).numpy()
    memory = DeviceMemory(kv_cache)
    assert memory.digests(ids) == digest_rows(np.ascontiguousarray(words[ids]))
    assert memory.digests(ids) == HostMemory(words.view(np.uint8)).digests(ids)
    assert memory.digests([]) == []


def test_device_memory_addresses_blocks() -> None:
    kv_cache = torch.zeros(SHAPE)
    memory = DeviceMemory(kv_cache)
    assert (memory.num_blocks, memory.block_bytes, memory.device) == (40, kv_cache[0].nbytes, "cpu")
    assert memory.address == kv_cache.data_ptr()
    assert memory.view(3).data_ptr() == kv_cache[3].data_ptr()
    memory.view(3).fill_(0xFF)
    assert bool(kv_cache[3].isnan().all())


@pytest.mark.parametrize("block_id", [-1, 40])
def test_blocks_outside_the_pool_are_refused(block_id: int) -> None:
    memory = DeviceMemory(torch.zeros(SHAPE))
    with pytest.raises(IndexError, match="40"):
        memory.view(block_id)
    with pytest.raises(IndexError, match="40"):
        memory.digests([0, block_id])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_digests_are_those_of_the_block_store() -> None:
    kv_cache = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    expected = HostMemory(kv_cache.view(40, -1).view(torch.uint8).numpy()).digests(range(40))
    assert block_memory(kv_cache.cuda()).digests(range(40)) == expected
