"""A timer that follows a deadline which moves: how the shells of the state machines keep their time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

# A timer that is so late was held up by our own loop. What peers sent meanwhile waits unread, and is read first.
_STALL_S: Final = 0.25
_GRACE_S: Final = 0.25


class Alarm:
    """Calls `ring` at a deadline on `clock`. Setting it later than it stands costs nothing until it rings.

    After a stall of our own loop it rings a moment later, so that nobody is late because we were.
    """

    def __init__(self, clock: Callable[[], float], ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_deadline = 0.0
        self._is_grace = False

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
        deadline, was_grace = self._deadline, self._is_grace
        self._is_grace = False
        if deadline is None:
            return
        late_s = self._clock() - deadline
        if late_s < 0:
            self.set(deadline)
        elif late_s > _STALL_S and not was_grace:
            self._is_grace = True
            self._timer = asyncio.get_running_loop().call_later(_GRACE_S, self._wake)
        else:
            self._deadline = None
            self._ring()
