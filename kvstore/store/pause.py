"""Decides how long to leave alone what refused. Pure; the clock is passed in."""

from __future__ import annotations

from collections.abc import Callable


class Pause:
    """Holds for `length_s` from each `begin`; after that it is begun still, until `end` says that all is well."""

    def __init__(self, clock: Callable[[], float], length_s: float) -> None:
        self._clock = clock
        self._length_s = length_s
        self._until: float | None = None

    @property
    def is_begun(self) -> bool:
        """Whether the last try was refused."""
        return self._until is not None

    @property
    def holds(self) -> bool:
        """Whether it is too soon for another try."""
        return self._until is not None and self._clock() < self._until

    def begin(self) -> None:
        """Note a refusal."""
        self._until = self._clock() + self._length_s

    def end(self) -> None:
        """Note that a try went well."""
        self._until = None
