"""Holds what both machines of a transfer share: three events, the action that ends a connection, a short history.

Events are the peer's messages (`messages`) and what happens here; actions are messages to send and orders to the shell.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvstore.errors import IllegalTransition

_HISTORY_LENGTH: Final = 32


@dataclass(frozen=True)
class Timer:
    """Event: the time of `next_deadline` has come, perhaps."""


@dataclass(frozen=True)
class AbortOrdered:
    """Event: our own side wants no more of the transfer."""

    reason: str


@dataclass(frozen=True)
class PeerGone:
    """Event: the connection is gone, or never was one to the process that was meant."""

    detail: str
    was_another: bool = False
    """Whether another start of the peer's process is at the other end."""


@dataclass(frozen=True)
class HangUp:
    """Action: end the connection and its link, and with them all that goes on over it."""

    reason: str


class History:
    """The last states and events of one item."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._entries: deque[str] = deque(maxlen=_HISTORY_LENGTH)

    def note(self, now: float, state: Enum, event: object) -> None:
        """Remember that `event` met the item in `state`."""
        self._entries.append(f"{now:.4f} {state.name} <- {type(event).__name__}")

    def illegal(self, state: Enum, event: object) -> IllegalTransition:
        """Return the error for an event that must not happen in `state`."""
        what = f"{type(event).__name__} is illegal in {state.name}"
        return IllegalTransition(f"{self._name}: {what}. History: {'; '.join(self._entries)}")
