"""A seeded event loop: virtual time, several processes in one loop, nothing real. Equal seeds leave equal traces.

Each callback belongs to a `Process`: a task's steps to the one that made the task, everything else to the one that is
running. A process can be paused (its callbacks wait) and killed (they wait for ever). With `shuffles`, the next
callback is drawn from all that are ready; else they run in the order in which they came, as in asyncio. What a
process's threads hand to its loop keeps its order in any case: they are one after the other, and the product may know.

Ideas of simloop, async-solipsism and looptime; code of none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import heapq
import itertools
import random
from array import array
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# Callbacks at one instant: more is a task that spins.
_MAX_AT_ONCE = 100_000
_CLEANUP_S = 3600.0


class Stuck(AssertionError):
    """Nothing will ever happen again, or too much at one instant, or the time is up; the message names who waits."""


class Stopped(Exception):
    """Somebody has called `SimLoop.stop`."""


class Process:
    """One simulated process. `clock_ahead_s`: how far its monotonic clock is ahead of the loop's time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_paused = False
        self.is_killed = False
        self.clock_ahead_s = 0.0
        self.parked: list[asyncio.Handle] = []


class SimTask(asyncio.Task):
    """A task with an owner, and with a hash that does not depend on its address: sets of tasks have an order."""

    def __init__(self, number: int, process: Process, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> None:
        self.number = number
        self.process = process
        super().__init__(coro, **kwargs)

    def __hash__(self) -> int:
        return self.number

    __eq__ = object.__eq__


class _FromThread(asyncio.Handle):
    """What a thread has handed over."""


class _Within:
    """By hand: there are hundreds in a run."""

    __slots__ = ("_before", "_loop", "_process")

    def __init__(self, loop: SimLoop, process: Process) -> None:
        self._loop = loop
        self._process = process

    def __enter__(self) -> None:
        self._before, self._loop.process = self._loop.process, self._process

    def __exit__(self, *error: object) -> None:
        self._loop.process = self._before


class SimLoop(asyncio.AbstractEventLoop):
    """Run it with `run`; `finish` it when the verdict is known."""

    def __init__(self, seed: int, shuffles: bool = True) -> None:
        self.random = random.Random(seed)
        self.world = self.process = Process("world")
        self.errors: list[dict[str, Any]] = []
        """Of callbacks and tasks, that nobody saw: `call_exception_handler`'s contexts."""
        self.num_callbacks = 0
        self.open_connection: Callable[..., Coroutine[Any, Any, Any]] | None = None
        """Of a network, where there is one: a maker of a protocol, a host and a port give a transport and that."""
        self._shuffles = shuffles
        self._now = 0.0
        self._num_at_once = 0
        self._ready: list[tuple[Process, asyncio.Handle]] = []
        self._timers: list[tuple[float, int, Process, asyncio.TimerHandle]] = []
        self._next_number = itertools.count(1).__next__
        self._tasks: list[SimTask] = []
        self._processes = [self.world]
        self._trace_times = array("d")  # of each callback that ran; and beside it, whose it was and what
        self._trace_names: list[str] = []
        self._is_stopped = False
        self._is_over = False

    # ---- processes ----

    def new_process(self, name: str) -> Process:
        process = Process(name)
        self._processes.append(process)
        return process

    def within(self, process: Process) -> _Within:
        """What is started here belongs to this process."""
        return _Within(self, process)

    def pause(self, process: Process) -> None:
        process.is_paused = True

    def resume(self, process: Process) -> None:
        process.is_paused = False
        if not process.is_killed:
            self._ready += [(process, handle) for handle in process.parked]
            process.parked.clear()

    def kill(self, process: Process) -> None:
        process.is_killed = True

    # ---- running ----

    @property
    def trace(self) -> str:
        """A hash over all callbacks that ran, with their times and owners."""
        digest = hashlib.blake2b(self._trace_times.tobytes(), digest_size=16)
        digest.update("\n".join(self._trace_names).encode())
        return digest.hexdigest()

    def run(self, main: Coroutine[Any, Any, _Result], max_s: float) -> _Result:
        """Run until it has returned. Raises `Stuck`, `Stopped`."""
        with self._running():
            task = self.create_task(main)
            while not task.done():
                if self._is_stopped:
                    raise Stopped
                self._step(max_s)
            return task.result()

    def stop(self) -> None:
        """Run nothing after this callback."""
        self._is_stopped = True

    def finish(self) -> None:
        """Let go of everything: whoever is paused or killed wakes up to be cancelled. Nothing counts any more."""
        self._is_over = True
        with self._running():
            for process in self._processes:
                process.is_killed = False
                self.resume(process)
            end_s = self._now + _CLEANUP_S
            while left := [task for task in self._tasks if not task.done()]:
                for task in left:
                    task.cancel()
                for _ in range(1000):
                    if self._now > end_s or not self._step_quietly():
                        return
                    if all(task.done() for task in left):
                        break

    def _step_quietly(self) -> bool:
        try:
            self._step(float("inf"))
        except Stuck:
            return False
        return True

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)

    def _step(self, max_s: float) -> None:
        """Run one callback; where none is ready, let the time pass until one is."""
        self._take_due()
        while not self._ready:
            if not self._timers:
                raise Stuck(f"deadlock at {self._now:.3f} s: nothing is ready, no timer runs. {self._who_waits()}")
            self._now = max(self._now, self._timers[0][0])
            self._num_at_once = 0
            self._take_due()
        if self._now > max_s:
            raise Stuck(f"not done within {max_s} s. {self._who_waits()}")
        self._num_at_once += 1
        if self._num_at_once > _MAX_AT_ONCE:
            raise Stuck(f"{_MAX_AT_ONCE} callbacks at {self._now:.3f} s: somebody spins. {self._who_waits()}")
        at = self.random.randrange(len(self._ready)) if self._shuffles and not self._is_over else 0
        if isinstance(self._ready[at][1], _FromThread):
            at = self._first_of_thread(self._ready[at][0])
        process, handle = self._ready.pop(at)
        if handle.cancelled():
            return
        if process.is_paused or process.is_killed:
            process.parked.append(handle)
            return
        self.num_callbacks += 1
        if not self._is_over:
            self._trace_times.append(self._now)
            self._trace_names += process.name, _label(handle._callback)
        before, self.process = self.process, process
        handle._run()
        self.process = before

    def _first_of_thread(self, process: Process) -> int:
        """The place of the first of all that this process's threads have handed over."""
        return next(
            place
            for place, (whose, each) in enumerate(self._ready)
            if whose is process and isinstance(each, _FromThread)
        )

    def _take_due(self) -> None:
        while self._timers and (self._timers[0][0] <= self._now or self._timers[0][3].cancelled()):
            _, _, process, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                self._ready.append((process, handle))

    def _who_waits(self) -> str:
        waiting = [task.get_name() for task in self._tasks if not task.done() and not task.process.is_killed]
        return f"Waiting: {', '.join(waiting[:20])}"

    # ---- what asyncio and the product call ----

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((self._owner(callback), handle))
        return handle

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = _FromThread(callback, args, self, context)
        self._ready.append((self._owner(callback), handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, self._next_number(), self._owner(callback), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is left out when its time comes."""

    def _owner(self, callback: object) -> Process:
        task = getattr(callback, "__self__", None)
        return task.process if isinstance(task, SimTask) else self.process

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, _Result], *, name: str | None = None, context: Any = None, **kwargs: Any
    ) -> asyncio.Task[_Result]:
        number = self._next_number()
        what = name or getattr(coro, "__qualname__", "coroutine")
        label = f"{self.process.name}:{what}#{number}"
        task = SimTask(number, self.process, coro, loop=self, name=label, context=context, **kwargs)
        self._tasks.append(task)
        return task

    async def create_connection(
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, **kwargs: Any
    ) -> Any:
        assert self.open_connection is not None, f"there is no network to reach {host}:{port} by"
        return await self.open_connection(protocol_factory, host, port)

    def run_in_executor(self, executor: Any, func: Callable[..., _Result], *args: Any) -> asyncio.Future[_Result]:
        """`executor` is a pool of `tests.simulation.threads`."""
        started: asyncio.Future[_Result] = executor.start(functools.partial(func, *args))
        return started

    def is_running(self) -> bool:
        return not self._is_over

    def is_closed(self) -> bool:
        return False

    def get_debug(self) -> bool:
        return False

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._is_over:
            self.errors.append(context)


def _label(callback: Any) -> str:
    """Name a callback, the same in every run."""
    while isinstance(callback, functools.partial):
        callback = callback.func
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return owner.get_name()
    return str(getattr(callback, "__qualname__", type(callback).__name__))
