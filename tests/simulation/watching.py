"""What a run looks at in the product: every transition of both machines, and every error that it logs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from kvstore.exchange import reader as exchange_reader
from kvstore.protocol import FetchMachine, LeaseMachine
from kvstore.protocol import fetch as fetch_table
from kvstore.protocol import lease as lease_table
from tests.simulation.pool import BLOCK_BYTES, Invariant

if TYPE_CHECKING:
    from tests.simulation.world import World


@contextlib.contextmanager
def watching(world: World) -> Iterator[None]:
    """See every transition of both machines, and every error that the product logs."""

    def watched(handle: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def run(machine: Any, event: object, now: float) -> list[Any]:
            state = machine.state.name
            actions = handle(machine, event, now)
            world.saw(machine, state, event, actions)
            return actions

        return run

    logger, listener = logging.getLogger("kvstore"), _LogListener(world)
    propagate, level = logger.propagate, logger.level
    logger.addHandler(listener)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    inline_bytes = BLOCK_BYTES if world.verifies_off_loop else exchange_reader._MAX_INLINE_BYTES
    try:
        with (
            mock.patch.object(FetchMachine, "handle", watched(FetchMachine.handle)),
            mock.patch.object(LeaseMachine, "handle", watched(LeaseMachine.handle)),
            mock.patch.object(exchange_reader, "_MAX_INLINE_BYTES", inline_bytes),
        ):
            yield
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate
        logger.setLevel(level)


class _LogListener(logging.Handler):
    """Errors with a traceback are ours, and so is a violation among peers that all keep the protocol."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info or "violates the block protocol" in message:
            error = record.exc_info[1] if record.exc_info else None
            self._world.report(Invariant.NO_INTERNAL_ERROR, f"{message}: {error!r}")


def all_transitions() -> set[str]:
    """Every row of both tables that may be met."""
    names = {"fetch": fetch_table.TRANSITIONS, "lease": lease_table.TRANSITIONS}
    return {
        f"{kind} {state.name} {event.__name__}"
        for kind, table in names.items()
        for state, row in table.items()
        for event, handler in row.items()
        if handler is not None
    }
