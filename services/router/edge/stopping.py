"""Ends requests that still run, each with an error of its own: all when the router's time is up, one by its id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from services.router.errors import aborted, timed_out, unavailable

Whose = tuple[str, str]
"""A request: its tenant's name, and its id."""


class Stopping:
    """Holds the deadlines of all requests. Event loop only."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Timeout, Whose | None] = {}
        self._aborted: set[asyncio.Timeout] = set()
        self._is_over = False

    @asynccontextmanager
    async def deadline(
        self, left_s: float | None, total_s: float | None, whose: Whose | None = None
    ) -> AsyncIterator[None]:
        """End in the time that is left, if there is a limit, what runs under it: with ApiError 504 that names the
        total, with 503 when the router's time is up, or with 499 when it is aborted, for which it needs `whose`.
        """
        scope = asyncio.timeout(0 if self._is_over else left_s)
        try:
            async with scope:
                self._running[scope] = whose
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            if scope in self._aborted:
                raise aborted() from error
            if self._is_over:
                raise unavailable("The router is shutting down. Try again.", "router_stopping") from error
            raise timed_out(f"The request was not finished within {total_s:g} s.") from error
        finally:
            self._running.pop(scope, None)
            self._aborted.discard(scope)

    def end(self) -> int:
        """End all that run, and whatever begins later at once; returns how many there were."""
        self._is_over = True
        return len(self._end(self._running))

    def abort(self, tenant: str, request_ids: Collection[str]) -> list[str]:
        """End a tenant's requests of these ids; returns those that ran."""
        wanted = {(tenant, request_id) for request_id in request_ids}
        ended = self._end([scope for scope, whose in self._running.items() if whose in wanted])
        self._aborted.update(ended)
        return list({whose[1]: None for scope in ended if (whose := self._running[scope]) is not None})

    def _end(self, scopes: Collection[asyncio.Timeout]) -> list[asyncio.Timeout]:
        now_s = asyncio.get_running_loop().time()
        running = [scope for scope in scopes if not scope.expired()]
        for scope in running:
            scope.reschedule(now_s)
        return running
