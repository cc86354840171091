"""A timer that follows a deadline which moves: how the shells of the state machines keep their time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls `ring` at a deadline on `clock`. Setting it later than it stands costs nothing until it rings."""

    def __init__(self, clock: Callable[[], float], ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_deadline = 0.0

    def set(self, deadline: float | None) -> None:
        """Ring at `deadline`; None: not at all."""
        self._deadline = deadline
        if self._timer is not None and (deadline is None or deadline < self._timer_deadline):
            self._timer.cancel()
            self._timer = None
        if deadline is not None and self._timer is None:
            self._timer_deadline = deadline
            delay_s = max(0.0, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        deadline = self._deadline
        if deadline is not None and self._clock() < deadline:
            self.set(deadline)
        elif deadline is not None:
            self._deadline = None
            self._ring()
