"""Ends the requests that still run when the router's time is up, each with an error of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.router.errors import timed_out, unavailable


class Stopping:
    """Holds the deadlines of all requests. Event loop only."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()
        self._is_over = False

    @asynccontextmanager
    async def deadline(self, left_s: float | None, total_s: float | None) -> AsyncIterator[None]:
        """End in the time that is left, if there is a limit, what runs under it: with ApiError 504 that names the
        total, or with 503 when the router's time is up.
        """
        scope = asyncio.timeout(0 if self._is_over else left_s)
        try:
            async with scope:
                self._running.add(scope)
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            if self._is_over:
                raise unavailable("The router is shutting down. Try again.", "router_stopping") from error
            raise timed_out(f"The request was not finished within {total_s:g} s.") from error
        finally:
            self._running.discard(scope)

    def end(self) -> int:
        """End all that run, and whatever begins later at once; returns how many there were."""
        self._is_over = True
        now_s = asyncio.get_running_loop().time()
        running = [scope for scope in self._running if not scope.expired()]
        for scope in running:
            scope.reschedule(now_s)
        return len(running)
