"""The pool's memory is backed beside the work: all of it, and no byte of it changes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from kvstore.block import HostMemory
from kvstore.threads import OsThreads
from services.worker.pool_pages import back, pool_backed

BLOCK_BYTES = 3 << 20  # no multiple of a piece
NUM_BLOCKS = 10

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def new_pool() -> HostMemory:
    return HostMemory(np.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8))


def test_all_of_the_pool_is_there_and_what_was_written_stays() -> None:
    memory = new_pool()
    memory.array[3, 5], memory.array[-1, -1] = 7, 9
    before = resident_bytes()
    page = memory.address % 4096
    assert back(memory, lambda seconds: False) == NUM_BLOCKS * BLOCK_BYTES + page
    assert resident_bytes() - before > 0.6 * NUM_BLOCKS * BLOCK_BYTES
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
