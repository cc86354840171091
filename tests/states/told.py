"""Has a model of an item do what its table says, as the service does; an action may break."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from services.worker.states import States


class _ActionFailed(Exception):
    """A bug of ours."""


class Told:
    """The part of a model that hears of events. `breaks`: the next action that can break does."""

    TABLE: ClassVar[Mapping[Any, Any]]
    BROKEN: ClassVar[Any]
    state: Any
    breaks: bool
    breaks_left: int

    def report(self) -> None:
        raise NotImplementedError

    def _do(self, action: Any) -> None:
        raise NotImplementedError

    def report_and_break(self) -> None:
        self.breaks_left -= 1
        self.breaks = True
        self.report()
        self.breaks = False

    def _tell(self, event: Any) -> None:
        states = States(type(self).__name__, self.TABLE, self.state)
        actions = states.move(event)
        self.state = states.state
        try:
            for action in actions:
                self._do(action)
        except _ActionFailed:
            self._tell(self.BROKEN)

    def _break(self) -> None:
        if self.breaks:
            self.breaks = False
            raise _ActionFailed
