"""What both state machines of the block protocol share: an action, and a memory of how an item got where it is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from kvstore.errors import IllegalTransition

MessageT = TypeVar("MessageT")

_HISTORY_LENGTH: Final = 32


@dataclass(frozen=True)
class SendMessage(Generic[MessageT]):
    """Send this to the peer (nothing happens if the connection is gone)."""

    message: MessageT


class History:
    """The last states and events of one item."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._entries: deque[str] = deque(maxlen=_HISTORY_LENGTH)

    def note(self, now: float, state: Enum, event: object) -> None:
        """Remember that `event` met the item in `state`."""
        self._entries.append(f"{now:.4f} {state.name} <- {type(event).__name__}")

    def illegal(self, state: Enum, event: object, why: str = "") -> IllegalTransition:
        """Return the error for an event that must not happen in `state`."""
        lines = "; ".join(self._entries)
        reason = f" ({why})" if why else ""
        return IllegalTransition(
            f"{self._name}: {type(event).__name__} is illegal in {state.name}{reason}. History: {lines}"
        )
