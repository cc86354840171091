"""The pool's memory is backed beside the work: all of it, and no byte of it changes."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest

from kvstore.block import HostMemory
from kvstore.threads import OsThreads
from services.worker.pool_pages import back, pool_backed

BLOCK_BYTES = 3 << 20  # no multiple of a piece
NUM_BLOCKS = 10

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def new_pool() -> HostMemory:
    """A pool in a mapping of its own, so that no page of it is there, and not at the beginning of a page."""
    pages = mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(pages, np.uint8, NUM_BLOCKS * BLOCK_BYTES, offset=64)
    return HostMemory(array.reshape(NUM_BLOCKS, BLOCK_BYTES))


def num_missing_pages(memory: HostMemory) -> int:
    """How many of the pool's pages the system has put no memory behind."""
    first = memory.geometry.regions[0].address // mmap.PAGESIZE
    end = -(-(memory.geometry.regions[0].address + NUM_BLOCKS * BLOCK_BYTES) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(first * 8)
        entries = np.frombuffer(file.read((end - first) * 8), np.uint64)
    assert len(entries) == end - first
    return int(np.count_nonzero(entries >> np.uint64(62) == 0))  # neither present nor swapped out


def test_all_of_the_pool_is_there_and_what_was_written_stays() -> None:
    memory = new_pool()
    memory.array[3, 5], memory.array[-1, -1] = 7, 9
    assert num_missing_pages(memory) > 0
    page = memory.geometry.regions[0].address % mmap.PAGESIZE
    assert back(memory, lambda seconds: False) == NUM_BLOCKS * BLOCK_BYTES + page
    assert num_missing_pages(memory) == 0
    assert memory.array[3, 5] == 7
    assert memory.array[-1, -1] == 9
    assert np.count_nonzero(memory.array) == 2


def test_a_worker_that_stops_does_not_wait_for_the_rest_of_its_pool() -> None:
    rests: list[float] = []
    backed = back(new_pool(), lambda seconds: rests.append(seconds) or len(rests) == 2)
    assert backed < NUM_BLOCKS * BLOCK_BYTES / 2
    assert min(rests) > 0


def test_the_pool_is_backed_while_the_body_runs() -> None:
    memory = new_pool()
    with pool_backed(memory, OsThreads()):
        memory.array[:, 0] = 1
    assert np.count_nonzero(memory.array) == NUM_BLOCKS
