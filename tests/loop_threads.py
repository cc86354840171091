"""`kvstore.threads` without threads: everything runs within the event loop, in the order in which it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from kvstore.threads import Runner

_Result = TypeVar("_Result")


class _Inline(Executor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _LoopRunner:
    def __init__(self, turn: Callable[[], bool]) -> None:
        self._turn = turn
        self._next: asyncio.Handle | None = None

    def wake(self) -> None:
        if self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._go)

    async def stop(self, timeout_s: float) -> bool:
        self._turn = lambda: False
        return True

    def _go(self) -> None:
        self._next = None
        if self._turn():
            self.wake()


class LoopThreads:
    def pool(self, name: str, num_threads: int = 1) -> Executor:
        return _Inline()

    async def run(self, work: Callable[[], _Result]) -> _Result:
        return work()

    def start(self, name: str, turn: Callable[[], bool]) -> Runner:
        return _LoopRunner(turn)
