"""The last wait of a worker's shutdown, bounded like every other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

log = logging.getLogger(__name__)

# Longer than the exchange needs to end its transfers after it was closed.
_SETTLE_TIMEOUT_S = 15.0


async def settled(tasks: Collection[asyncio.Task[Any]], what: str) -> None:
    """Wait for tasks that give back what transfers held; those that do not end are named, and left."""
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=_SETTLE_TIMEOUT_S)
        if pending:
            log.error(
                "%d %s hold blocks still, %g s after the exchange was closed", len(pending), what, _SETTLE_TIMEOUT_S
            )
