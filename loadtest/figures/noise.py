"""Tells a difference from noise: batch means, paired.

Requests of one run are not independent, since they share queues; stretches of time nearly are. So a run is cut into
stretches, each gives a figure, and their scatter says how well the mean is known (the method of batch means, as in
A. Law, "Simulation Modeling and Analysis", with Student's t). Two targets got the same requests at the same times, so
their stretches are compared in pairs: what both suffer from, such as a burst, cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_BATCHES = 4
# Student's t, 97.5 %, by degrees of freedom: two-sided intervals of 95 %.
_T = {
    3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201, 12: 2.179, 13: 2.160,
    14: 2.145, 15: 2.131,
}  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    def has(self, value: float) -> bool:
        return self.low <= value <= self.high


def mean_of(values: Sequence[float]) -> Interval | None:
    """The mean of independent figures; None of fewer than four: their scatter says nothing."""
    if len(values) < MIN_BATCHES:
        return None
    mean = statistics.fmean(values)
    degrees = len(values) - 1
    half = _T[min(degrees, max(_T))] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(left: Sequence[float | None], right: Sequence[float | None]) -> Interval | None:
    """Of left to right, stretch by stretch; those without a figure on either side are left out."""
    pairs = zip(left, right, strict=True)
    return mean_of([one - other for one, other in pairs if one is not None and other is not None])


def ratio(left: Sequence[float | None], right: Sequence[float | None]) -> Interval | None:
    """Of left to right, stretch by stretch: the geometric mean. Figures that are not positive are left out."""
    logs = difference(*([math.log(each) if each else None for each in side] for side in (left, right)))
    return logs and Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))
