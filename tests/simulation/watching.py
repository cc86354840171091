"""What a run looks at in the product: every transition of both machines, and every error that it logs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from kvstore.exchange import reader as exchange_reader
from kvstore.protocol import FetchMachine, LeaseMachine
from kvstore.protocol import fetch as fetch_table
from kvstore.protocol import lease as lease_table
from tests.simulation.ledger import listening
from tests.simulation.pool import BLOCK_BYTES

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

    inline_bytes = BLOCK_BYTES if world.verifies_off_loop else exchange_reader._MAX_INLINE_BYTES
    with (
        mock.patch.object(FetchMachine, "handle", watched(FetchMachine.handle)),
        mock.patch.object(LeaseMachine, "handle", watched(LeaseMachine.handle)),
        mock.patch.object(exchange_reader, "_MAX_INLINE_BYTES", inline_bytes),
        listening(world, ("kvstore",)),
    ):
        yield


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
