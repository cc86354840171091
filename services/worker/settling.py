"""Gives back what transfers held, and waits for that at a worker's shutdown, up to a deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any

log = logging.getLogger(__name__)

# Longer than the exchange needs to end its transfers after it was closed.
_SETTLE_TIMEOUT_S = 15.0


async def settled(tasks: Collection[asyncio.Task[Any]], what: str) -> None:
    """Wait for tasks that give back what transfers held; those that do not end are named, and left."""
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=_SETTLE_TIMEOUT_S)
        if pending:
            _log_unsettled(len(pending), what)


def _log_unsettled(number: int, what: str) -> None:
    log.error("%d %s hold blocks still, %g s after the exchange was closed", number, what, _SETTLE_TIMEOUT_S)


class Settlements:
    """Such tasks, until they have ended. One that breaks is logged: nobody else hears of it."""

    def __init__(self, what: str) -> None:
        """`what` they are, in the plural, for the log."""
        self._what = what
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_ended)

    def __len__(self) -> int:
        return len(self._tasks)

    async def ended(self) -> None:
        """Wait until there are none."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def settled(self) -> None:
        """Wait for the last ones, and what these begin, with the exchange closed."""
        try:
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                await self.ended()
        except TimeoutError:
            _log_unsettled(len(self._tasks), self._what)

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s broke: blocks that it held may be lost", task.get_name(), exc_info=error)
