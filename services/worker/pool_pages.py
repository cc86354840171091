"""Has the system put memory behind the KV pool while the worker serves already.

New memory costs a page fault at its first use, and a whole pool costs seconds. So a thread goes through the pool,
lowest blocks first, as the pool hands them out, and rests most of the time: the engine wants the same core.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvstore.block import BlockMemory
from kvstore.threads import Threads

log = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23  # <linux/mman.h>, since Linux 5.14; Python does not name it
_PIECE_BYTES = 4 << 20  # whoever changes the process's mappings waits for a piece: milliseconds
_REST = 4  # times as long as it worked


@contextmanager
def pool_backed(memory: BlockMemory, threads: Threads) -> Iterator[None]:
    """Back `memory`, as far as time allows, while the body runs. Whoever computes on it meanwhile notices nothing."""
    is_stopping = False

    def rest(seconds: float) -> bool:
        time.sleep(seconds)
        return is_stopping

    pool = threads.pool("pool-pages")
    work = pool.submit(back, memory, rest)
    try:
        yield
    finally:
        is_stopping = True
        pool.shutdown()
        work.result()


def back(memory: BlockMemory, rest: Callable[[float], bool]) -> int:
    """Back the pool piece by piece, `rest(seconds)` between two, until all is done or it returns True.

    Returns the number of bytes backed. The GPU's memory is there already; other systems than Linux cannot be asked.
    """
    if memory.device != "cpu" or sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    num_backed = 0
    for region in memory.geometry.regions:
        start = region.address & -mmap.PAGESIZE
        end = region.address + memory.geometry.span_bytes
        for address in range(start, end, _PIECE_BYTES):
            began_s, size = time.perf_counter(), min(_PIECE_BYTES, end - address)
            # As a write would, and without one: what others have written there stays.
            if libc.madvise(address, size, _MADV_POPULATE_WRITE) != 0:
                reason = errno.errorcode.get(ctypes.get_errno(), "")
                log.info("the KV pool's memory comes as blocks are first used: MADV_POPULATE_WRITE says %s", reason)
                return num_backed
            num_backed += size
            if rest((time.perf_counter() - began_s) * _REST):
                return num_backed
    return num_backed
