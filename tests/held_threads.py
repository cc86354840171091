"""Holds single threads of another process, as a call would that never comes back; the others go on. Linux, as root."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_ALL_KINDS = 0x40000000  # __WALL


@contextmanager
def held(thread_id: int) -> Iterator[None]:
    """Stop a thread; to be left in the thread that entered."""
    _ptrace(_SEIZE, thread_id)
    _ptrace(_INTERRUPT, thread_id)
    os.waitpid(thread_id, _ALL_KINDS)
    try:
        yield
    finally:
        _ptrace(_DETACH, thread_id)


def nixl_thread(pid: int) -> int:
    """The one that polls its agent, a thousand times a second, and waits for no events."""
    return _liveliest(pid, set(_threads(pid)) - _epoll_waiters(pid))


def ucx_thread(pid: int) -> int:
    """The one that waits for events and has some all the time, but for the event loop."""
    return _liveliest(pid, _epoll_waiters(pid))


def file_writers(pid: int) -> list[int]:
    """Those that have written to files, but for the main one, and whoever logs."""
    return [
        thread
        for thread in _threads(pid)
        if thread != pid and int(_read(pid, thread, "io").split("write_bytes:")[1].split()[0]) >= 1 << 16
    ]


def _liveliest(pid: int, threads: set[int]) -> int:
    """The one that wakes most often in a second in which nothing is to do, but for the main one."""
    before = {thread: _num_wakes(pid, thread) for thread in threads - {pid}}
    time.sleep(1.0)
    return max(before, key=lambda thread: _num_wakes(pid, thread) - before[thread])


def _epoll_waiters(pid: int) -> set[int]:
    """Those that were seen to wait for events, at any of several looks."""
    found: set[int] = set()
    for _ in range(20):
        found |= {thread for thread in _threads(pid) if _read(pid, thread, "wchan").endswith("epoll_wait")}
        time.sleep(0.01)
    return found


def _threads(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def _num_wakes(pid: int, thread: int) -> int:
    return int(_read(pid, thread, "status").split("\nvoluntary_ctxt_switches:")[1].split()[0])


def _read(pid: int, thread: int, name: str) -> str:
    return Path(f"/proc/{pid}/task/{thread}/{name}").read_text().strip()


def _ptrace(request: int, thread_id: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if library.ptrace(request, thread_id, None, None) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace({request}, {thread_id})")
