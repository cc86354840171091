"""The pool in main memory."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.block import BlockMemory, HostMemory, Multipliers

KEY = Multipliers.of(b"a key")


def random_memory(num_blocks: int = 8, block_bytes: int = 256, seed: int = 0) -> HostMemory:
    memory = HostMemory.allocate(num_blocks, block_bytes)
    memory.array[:] = np.random.default_rng(seed).integers(0, 256, memory.array.shape, dtype=np.uint8)
    return memory


def test_memory_sums_blocks_in_the_order_asked_for():
    memory: BlockMemory = random_memory()
    expected = [KEY.sums(memory.view(i).view("<u8")) for i in (5, 0, 5, 7)]
    assert memory.sums([5, 0, 5, 7], KEY) == expected
    assert memory.sums([], KEY) == []


def test_a_view_is_the_pools_own_memory():
    memory = random_memory(4, 64)
    memory.view(2)[:] = 9
    assert memory.array[2].tolist() == [9] * 64
    assert memory.view(3).ctypes.data == memory.geometry.regions[0].address + 3 * 64
    assert (memory.num_blocks, memory.block_bytes, memory.device) == (4, 64, "cpu")


def test_an_allocated_pool_is_zeroed_and_page_aligned():
    memory = HostMemory.allocate(3, 4096 + 8)
    assert memory.geometry.regions[0].address % 4096 == 0
    assert not memory.array.any()


@pytest.mark.parametrize("block_id", [-1, 4, 2**40])
def test_a_block_outside_the_pool_is_refused(block_id):
    memory = random_memory(4, 64)
    with pytest.raises(IndexError, match="outside this pool of 4"):
        memory.view(block_id)
    with pytest.raises(IndexError, match="outside this pool of 4"):
        memory.sums([0, block_id], KEY)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 12), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros((4, 8), np.int8),
        np.zeros(32, np.uint8),
        np.zeros((4, 16), np.uint8)[:, ::2],
        np.frombuffer(bytes(32), np.uint8).reshape(4, 8),
    ],
    ids=["odd size", "no blocks", "signed", "flat", "strided", "read-only"],
)
def test_an_array_that_cannot_be_a_pool_is_refused(array):
    with pytest.raises(ValueError, match="expected"):
        HostMemory(array)
