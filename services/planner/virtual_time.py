"""Runs what is due, in order, in time that takes none: a heap of calls. What is due at once runs in order of asking."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class VirtualTime:
    """A clock and the calls that wait for it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_calls = 0
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._num_asked = 0

    def clock(self) -> float:
        """The time, for those who want a function."""
        return self.now_s

    def after(self, delay_s: float, call: Callable[..., object], *args: object) -> None:
        """Run it so much later."""
        self.at(self.now_s + delay_s, call, *args)

    def at(self, due_s: float, call: Callable[..., object], *args: object) -> None:
        """Run it then; what lies in the past is due at once."""
        self._num_asked += 1
        heapq.heappush(self._due, (max(due_s, self.now_s), self._num_asked, call, args))

    def run(self) -> None:
        """Run all that is due, and what that asks for, until nothing is left."""
        while self._due:
            self.now_s, _, call, args = heapq.heappop(self._due)
            self.num_calls += 1
            call(*args)
