"""Keeps an item's state: a table says where each event leads from each state, and what is to be done then. Pure.

Decides and does nothing: whoever tells it of an event carries out the actions that come back, in order. What an item
owns besides (messages, blocks, timers) is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Final, Generic, TypeAlias, TypeVar

from kvstore.errors import IllegalTransition

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)
A = TypeVar("A", bound=Enum)

Rows: TypeAlias = Mapping[E, tuple[S, tuple[A, ...]]]
"""Of one state: each event that it may meet, the state that comes of it, and what is to be done."""

_HISTORY_LENGTH: Final = 32


class States(Generic[S, E, A]):
    """One item's state."""

    def __init__(self, name: str, table: Mapping[S, Rows[E, S, A]], state: S) -> None:
        """`name`: whose they are, for messages."""
        self.state: S = state
        self._name = name
        self._table = table
        self._history: deque[str] = deque(maxlen=_HISTORY_LENGTH)

    def move(self, event: E) -> tuple[A, ...]:
        """Go where `event` leads; returns what is to be done. The only place that changes the state.

        Raises `IllegalTransition`, with the history, where the table has no row for it: a bug of ours.
        """
        row = self._table[self.state].get(event)
        if row is None:
            what = f"{event.name} is illegal in {self.state.name}"
            raise IllegalTransition(f"{self._name}: {what}. History: {'; '.join(self._history)}")
        state, actions = row
        if state is not self.state:
            self._history.append(f"{self.state.name} <- {event.name}")
            self.state = state
        return actions
