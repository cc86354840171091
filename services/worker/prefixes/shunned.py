"""Remembers whom to leave alone for a while: who did not answer, or lied."""

from __future__ import annotations

from collections.abc import Callable

_SHUN_S = 5.0


class Shunned:
    """Peers by name, each until its time is up. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}

    def add(self, name: str) -> None:
        """Leave it alone from now on, for five seconds."""
        now_s = self._clock()
        self._until_s = {each: until_s for each, until_s in self._until_s.items() if until_s > now_s}
        self._until_s[name] = now_s + _SHUN_S

    def names(self) -> list[str]:
        """Return those that are left alone at present."""
        now_s = self._clock()
        return [name for name, until_s in self._until_s.items() if until_s > now_s]
