"""Holds single threads of another process, as a call would that never comes back; the others go on.

Linux, where one may trace one's children.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_ALL_KINDS = 0x40000000  # __WALL


@contextmanager
def held(thread_id: int) -> Iterator[None]:
    """Stop a thread. Its process may end meanwhile, and has ended for others once we have heard of it, which we do."""
    is_held: Future[None] = Future()
    is_over = threading.Event()

    def hold() -> None:
        try:
            _ptrace(_SEIZE, thread_id)
            _ptrace(_INTERRUPT, thread_id)
            os.waitpid(thread_id, _ALL_KINDS)
        except OSError as error:
            is_held.set_exception(error)
            return
        is_held.set_result(None)
        while not is_over.wait(0.05):
            if os.waitpid(thread_id, _ALL_KINDS | os.WNOHANG) != (0, 0):
                return
        _ptrace(_DETACH, thread_id)

    # Of its own: only the thread that stopped one can let it go.
    holder = threading.Thread(target=hold, name="holder")
    holder.start()
    is_held.result()
    try:
        yield
    finally:
        is_over.set()
        holder.join()


def named(pid: int, name: str) -> list[int]:
    """A process's threads whose names begin so, and those that they have started; the eldest first."""
    return [thread for thread in sorted(_threads(pid)) if _read(pid, thread, "comm").startswith(name)]


def ucx_thread(pid: int) -> int:
    """The one that waits for events and has some all the time, but for the event loop."""
    return _liveliest(pid, _epoll_waiters(pid))


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
