"""Runs the engine in a thread: takes commands between steps, hands step outputs to the event loop.

The thread is the only one that touches scheduler, block pool and model, so none of them needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from kvstore.pool import CacheChange
from kvstore.threads import Runner, Threads
from services.engine.api import Engine, Request, StepOutput
from services.progress import Watch

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")

# So many commands wait for the end of a step only where clients come and go in masses meanwhile.
_MAX_COMMANDS = 16_384
# How long the step in progress may take to end when the worker stops.
_STOP_TIMEOUT_S = 30.0


class StepListener(Protocol):
    """Acts around a step. Called on the engine thread, so it must be quick and touch no loop state."""

    def on_begun(self, request: Request) -> None: ...

    def on_step(self, output: StepOutput) -> None: ...


class EngineThread:
    """Runs `engine.step` in a loop for as long as there is work.

    A step that raises ends the thread: `crashed` holds the exception, and every pending and later call fails with it,
    as after a stop. The engine's state is then unknown, so the process should stop.
    """

    def __init__(
        self,
        engine: Engine,
        threads: Threads,
        observe_step: Callable[[StepOutput], None] = lambda output: None,
        allowed_s: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """`observe_step` hears of each step, on the engine thread. `allowed_s`: how long what runs now may take."""
        self.cache_followers: list[Callable[[list[CacheChange]], None]] = []
        """They hear on the event loop, in order, what happened to findable blocks; added before the start."""
        self.host_followers: list[Callable[[list[CacheChange]], None]] = []
        """The same of the host tier."""
        self._engine = engine
        self._threads = threads
        self._observe_step = observe_step
        self._loop = asyncio.get_running_loop()
        self._commands: deque[Callable[[], None]] = deque()
        self._runner: Runner | None = None
        self.crashed: asyncio.Future[BaseException] = self._loop.create_future()
        self._ended: str | None = None  # why the thread takes no more commands
        self.is_in_turn = False
        """Whether commands and steps are being run: what is ordered now waits, else it is taken at once."""
        self.watch = Watch("step_loop", lambda: self.is_in_turn or self._is_waited_for, allowed_s)
        """What the thread has begun, it ends; what waits for it begins."""
        self._pending: set[asyncio.Future[object]] = set()

    def start(self, listener: StepListener) -> None:
        self._runner = self._threads.start("engine", lambda: self._turn(listener))
        self._engine.when_lost(self._runner.wake)
        self._runner.wake()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `function` on the engine thread between two steps; the future has its result or exception.

        Cancelling the future does not stop the function, which runs in any case.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._ended is not None:
            future.set_exception(EngineCrashed(self._ended))
            return future
        tracked: set[asyncio.Future[T]] = self._pending  # type: ignore[assignment]
        tracked.add(future)
        future.add_done_callback(tracked.discard)

        def command() -> None:
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                self._loop.call_soon_threadsafe(_settle, future, future.set_exception, error)
            else:
                self._loop.call_soon_threadsafe(_settle, future, future.set_result, result)

        self._order(command)
        return future

    def post(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Like `call`, for what nobody waits for: an exception is logged."""

        def command() -> None:
            try:
                function(*args, **kwargs)
            except Exception:
                log.exception("%s failed on the engine's thread: what it was to free may be lost", function)

        self._order(command)

    @property
    def is_behind(self) -> bool:
        """Whether so many commands wait that a worker should take no more work on."""
        return len(self._commands) >= _MAX_COMMANDS

    @property
    def _is_waited_for(self) -> bool:
        return self._runner is not None and self._ended is None and bool(self._commands)

    async def stop(self) -> None:
        """Finish the step in progress and end the thread; requests that still run are left as they are."""
        if self._runner is not None and not await self._runner.stop(_STOP_TIMEOUT_S):
            log.error("the engine's step has not ended within %g s; leaving it", _STOP_TIMEOUT_S)
        self._ended = self._ended or "the engine's thread has stopped"
        self._fail_pending()

    def _order(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if self._runner is not None:
            self._runner.wake()

    def _turn(self, listener: StepListener) -> bool:
        """Run the commands that wait, and a step; whether there was one."""
        if self._ended is not None:
            return False
        self.is_in_turn = True
        try:
            while self._commands:
                self._commands.popleft()()
                self.watch.advanced()
            has_stepped = self._engine.has_work and self._step(listener)
            self._report_cache_changes()
        except BaseException as error:
            log.exception("the engine crashed")
            self._ended = str(error)
            self._loop.call_soon_threadsafe(self._report_crash, error)
            return False
        finally:
            self.is_in_turn = False
            self.watch.advanced()
        return has_stepped

    def _step(self, listener: StepListener) -> bool:
        output = self._engine.step(listener.on_begun)
        if not output.num_tokens:
            return False  # nothing can run before a command frees memory or brings work
        self._observe_step(output)
        listener.on_step(output)
        return True

    def _report_cache_changes(self) -> None:
        for changes, followers in (
            (self._engine.take_cache_changes(), self.cache_followers),
            (self._engine.take_host_changes(), self.host_followers),
        ):
            if changes:
                for hear in followers:
                    self._loop.call_soon_threadsafe(hear, changes)

    def _report_crash(self, error: BaseException) -> None:
        if not self.crashed.done():
            self.crashed.set_result(error)
        self._fail_pending()

    def _fail_pending(self) -> None:
        for future in list(self._pending):
            if not future.done():
                future.set_exception(EngineCrashed(self._ended))


class EngineCrashed(Exception):
    """A step raised, and the worker is about to stop; or it has stopped."""


def _settle(future: asyncio.Future[T], settle: Callable[[U], None], outcome: U) -> None:
    if not future.done():
        settle(outcome)
