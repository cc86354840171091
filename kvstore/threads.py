"""Runs work beside the event loop, in pools and in loops of their own. The one module that starts threads.

`main()` makes `OsThreads` and hands it down; the tests have an implementation that runs everything within the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# How long an idle loop sleeps at most; a wake ends that at once.
_IDLE_WAIT_S = 1.0
# Single works at a time; further ones wait.
_MAX_RUNNING = 32


# How long threads that are left may take to end when the process does.
_LEAVE_S = 1.0


def end_threads(status: int) -> int:
    """Return the process's exit status once nothing runs beside the main thread, for which the interpreter would wait.

    Where a thread hangs in a system call (a disk that does not answer), the process ends here, with that status.
    """
    deadline_s = time.monotonic() + _LEAVE_S
    others = [each for each in threading.enumerate() if each is not threading.main_thread() and not each.daemon]
    for thread in others:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    hanging = [thread.name for thread in others if thread.is_alive()]
    if hanging:
        # In a thread: who hangs may hold a log handler's lock, or our output may be full.
        saying = threading.Thread(target=_say_last, args=(hanging,), daemon=True)
        saying.start()
        saying.join(_LEAVE_S)
        os._exit(status)
    return status


def _say_last(hanging: list[str]) -> None:
    logger.error("ending, although threads hang: %s", ", ".join(hanging))
    logging.shutdown()


def show_name() -> None:
    """Have the system know this thread by the first 15 letters of its name, for `top -H` and debuggers. Linux.

    Python does so by itself from 3.14 on.
    """
    with contextlib.suppress(OSError), open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
        file.write(threading.current_thread().name[:15])


class Runner(Protocol):
    """A loop beside ours."""

    def wake(self) -> None:
        """Have it take its next turn now, if it is idle. From any thread."""

    async def stop(self, timeout_s: float) -> bool:
        """Let the turn in progress end; False if it has not within the time, and is left to itself."""


class Threads(Protocol):
    """Runs a process's work off its event loop."""

    def pool(self, name: str, num_threads: int = 1) -> Executor:
        """Make a pool for `loop.run_in_executor`. Whoever asks for one shuts it down."""

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Return what `work` returns, done off the loop, once. Who is cancelled meanwhile leaves it running."""

    def start(self, name: str, turn: Callable[[], bool]) -> Runner:
        """Call `turn` again and again: at once where it returned True, else when it is woken, or after a while."""


class OsThreads:
    """`Threads` by the operating system's."""

    def __init__(self) -> None:
        self._running = asyncio.Semaphore(_MAX_RUNNING)

    def pool(self, name: str, num_threads: int = 1) -> Executor:
        return ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=show_name)

    async def run(self, work: Callable[[], _Result]) -> _Result:
        # Not `asyncio.to_thread`: at its end a process waits for those threads, and this one may hang in a file system.
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        done: asyncio.Future[_Result] = loop.create_future()

        def settle(set_outcome: Callable[..., None], outcome: object) -> None:
            if not done.done():
                set_outcome(outcome)

        def run() -> None:
            try:
                end: tuple[Callable[..., None], object] = (done.set_result, context.run(work))
            except BaseException as error:
                end = (done.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, *end)

        async with self._running:
            threading.Thread(target=run, name="work", daemon=True).start()
            return await done

    def start(self, name: str, turn: Callable[[], bool]) -> Runner:
        return _ThreadRunner(name, turn)


class _ThreadRunner:
    def __init__(self, name: str, turn: Callable[[], bool]) -> None:
        self._turn = turn
        # Held while the loop sleeps, let go to wake it: an Event would cost several times as much. And no SimpleQueue:
        # where its `get` is interrupted until its time-out has passed, it waits without end (CPython 3.11).
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        if self._asleep.locked():  # else a turn is to come that will see what this is about
            with contextlib.suppress(RuntimeError):  # somebody else has woken it in this very moment
                self._asleep.release()

    async def stop(self, timeout_s: float) -> bool:
        self._stopping = True
        self.wake()
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        show_name()
        try:
            while not self._stopping:
                if not self._turn():
                    self._asleep.acquire(timeout=_IDLE_WAIT_S)
        except BaseException:
            # Turns see to their own failures. That one has not is news, and nothing that a process should outlive.
            logger.critical("the loop %s broke; the process ends", self._thread.name, exc_info=True)
            logging.shutdown()
            os._exit(1)
