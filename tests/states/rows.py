"""Names the rows of the workers' tables, and sees which of them are met."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Final
from unittest import mock

from services.decode import stages
from services.prefill import order
from services.worker.states import States

TABLES: Final = (order.TRANSITIONS, stages.TRANSITIONS)


def all_rows() -> set[str]:
    """Every row of the tables of prefill orders and live requests."""
    return {_name(state, event) for table in TABLES for state, row in table.items() for event in row}


@contextlib.contextmanager
def seeing_rows(see: Callable[[str], None]) -> Iterator[None]:
    """Hear of every row that is met."""
    move = States.move

    def seen(states: States[Any, Any, Any], event: Enum) -> tuple[Any, ...]:
        before = states.state
        actions = move(states, event)
        see(_name(before, event))
        return actions

    with mock.patch.object(States, "move", seen):
        yield


def _name(state: Enum, event: Enum) -> str:
    return f"{type(state).__name__.removesuffix('State').lower()} {state.name} {event.name}"
