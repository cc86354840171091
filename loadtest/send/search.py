"""Looks for the highest rate that a target keeps up with: doubles or halves until it is bracketed, then bisects.

All rates are of one series, 20 % apart (E12, as resistors come), so that two targets are tried at equal rates. Pure:
whoever runs it says what came of each rate.
"""

from __future__ import annotations

_SERIES = (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2)
# Steps of the series in a factor of two, near enough.
_DOUBLE = 4
_MAX_STEPS = 24


def rate_at(place: int) -> float:
    """The rate at a place in the series; place 0 is 1 per second."""
    decade, index = divmod(place, len(_SERIES))
    return round(_SERIES[index] * 10.0**decade, 9)


def place_below(rate: float) -> int:
    """The place of the highest rate of the series that is not above this one."""
    place = 0
    while rate_at(place) > rate:
        place -= 1
    while rate_at(place + 1) <= rate:
        place += 1
    return place


class RateSearch:
    """One target's search. `next_rate` is what to try, None when the highest rate is known; `take` says what came."""

    def __init__(self, start: float) -> None:
        self._start = place_below(start)
        self._kept: int | None = None
        self._missed: int | None = None

    @property
    def found(self) -> float | None:
        """The highest rate known to be kept; None: none yet."""
        return None if self._kept is None else rate_at(self._kept)

    @property
    def next_rate(self) -> float | None:
        kept, missed = self._kept, self._missed
        if kept is None and missed is None:
            return rate_at(self._start)
        if missed is None:
            assert kept is not None
            return rate_at(kept + _DOUBLE) if kept < self._start + _MAX_STEPS else None
        if kept is None:
            return rate_at(missed - _DOUBLE) if missed > self._start - _MAX_STEPS else None
        return rate_at((kept + missed) // 2) if missed - kept > 1 else None

    def take(self, is_kept: bool) -> None:
        """What came of `next_rate`."""
        rate = self.next_rate
        assert rate is not None
        if is_kept:
            self._kept = place_below(rate)
        else:
            self._missed = place_below(rate)
