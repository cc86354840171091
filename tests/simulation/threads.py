"""`kvstore.threads` within a simulated loop: each job runs in one go, after a time that the seed draws."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from kvstore.threads import Runner
from tests.simulation.loop import SimLoop

_Result = TypeVar("_Result")

_IDLE_S = 1.0
_STUCK_S = 0.5


class SimThreads:
    """Of one process: make it, and call it, within that process. `max_delay_s` may change at any time."""

    def __init__(self, loop: SimLoop, max_delay_s: float = 0.01, max_turn_s: float = 0.0) -> None:
        """`max_turn_s`: of a thread that takes turns, as the engine's does step by step, where that is more."""
        self.max_delay_s = max_delay_s
        self.max_turn_s = max_turn_s
        self.stuck: set[str] = set()
        """Pools of which no job ends for now."""
        self._loop = loop

    def draw_s(self) -> float:
        return self._loop.random.uniform(0, self.max_delay_s)

    def draw_turn_s(self) -> float:
        return self._loop.random.uniform(0, max(self.max_delay_s, self.max_turn_s))

    def pool(self, name: str, num_threads: int = 1) -> Executor:
        return _Pool(self._loop, self, num_threads, name)

    async def run(self, work: Callable[[], _Result]) -> _Result:
        await asyncio.sleep(self.draw_s())
        return work()

    def start(self, name: str, turn: Callable[[], bool]) -> Runner:
        return _Runner(self._loop, self, turn)


class _Pool(Executor):
    """At most `num_threads` jobs at a time; the others wait in the order in which they came."""

    def __init__(self, loop: SimLoop, threads: SimThreads, num_threads: int, name: str) -> None:
        self._name = name
        self._loop = loop
        self._threads = threads
        self._num_idle = num_threads
        self._jobs: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()
        self._running: list[tuple[asyncio.Future[Any], Callable[[], Any]]] = []

    def start(self, work: Callable[[], _Result]) -> asyncio.Future[_Result]:
        done = self._loop.create_future()
        self._jobs.append((done, work))
        self._begin()
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The loop stands still until all are done: so they are done now."""
        self._threads.stuck.discard(self._name)
        while self._jobs or self._running:
            self._begin()
            self._end(self._running[0])

    def _begin(self) -> None:
        while self._jobs and self._num_idle:
            self._num_idle -= 1
            job = self._jobs.popleft()
            self._running.append(job)
            self._loop.call_later(self._threads.draw_s(), self._end, job)

    def _end(self, job: tuple[asyncio.Future[Any], Callable[[], Any]]) -> None:
        if job not in self._running:
            return
        if self._name in self._threads.stuck:
            self._loop.call_later(_STUCK_S, self._end, job)
            return
        self._running.remove(job)
        self._num_idle += 1
        done, work = job
        try:
            result = work()
        except Exception as error:
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(result)
        self._begin()


class _Runner:
    def __init__(self, loop: SimLoop, threads: SimThreads, turn: Callable[[], bool]) -> None:
        self._loop = loop
        self._threads = threads
        self._turn = turn
        self._is_stopped = False
        self._next = loop.call_later(0, self._go)

    def wake(self) -> None:
        if not self._is_stopped:
            self._next.cancel()
            self._next = self._loop.call_later(self._threads.draw_s(), self._go)

    async def stop(self, timeout_s: float) -> bool:
        self._is_stopped = True
        self._next.cancel()
        return True

    def _go(self) -> None:
        delay_s = self._threads.draw_turn_s() if self._turn() else _IDLE_S
        if not self._is_stopped:
            self._next = self._loop.call_later(delay_s, self._go)
