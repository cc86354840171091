"""Looks for the cheapest fleet that meets the objectives: bisection over the size, for each way to share it out.

Whether a fleet of a kind is enough is taken to be monotone in its size, which `good` is but for noise. Prefilling and
decoding workers are first tried in a few proportions; where the best of these ends, the sizes below it are climbed from
split to split, for as long as that finds a smaller fleet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from services.planner.fleet import Setup, Shape
from services.planner.outcomes import Outcomes
from services.planner.simulation import MAX_STEP_WORKERS
from services.planner.workload import Workload

_SHARES: Final = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4)
"""Of the workers, those that prefill."""


@dataclass
class Search:
    """The fleets tried for one workload, and the cheapest found of each kind."""

    run: Callable[[Shape], Outcomes]
    good: float
    """The share of requests that must be good, 0 to 1."""
    max_workers: int
    tried: dict[Shape, Outcomes] = field(default_factory=dict)
    best: dict[str, Shape | None] = field(default_factory=dict)
    """The cheapest of each kind; None: none is enough."""
    confirmed: list[Shape] = field(default_factory=list)
    """Those of which every step was taken."""

    @property
    def cheapest(self) -> Shape | None:
        """Of all kinds: that with the fewest workers, of equals that with more good requests."""
        found = [shape for shape in self.best.values() if shape is not None]
        return min(found, key=lambda each: (each.num_workers, -self.outcomes(each).good), default=None)

    def look(self, least: int) -> None:
        """Find the cheapest fleet of each kind."""
        split = self.split(least)
        self.best = {
            "colocated": self.colocated(least),
            "prefill and decode": split,
            "elastic": self.elastic(least, split),
        }

    def confirm(self, run: Callable[[Shape], Outcomes]) -> None:
        """Run the cheapest ones again by `run`, which takes every step; where that says no, one that is larger."""
        for kind, shape in self.best.items():
            while shape is not None and shape.num_workers <= MAX_STEP_WORKERS:
                self.tried[shape] = run(shape)
                self.confirmed.append(shape)
                if self.is_enough(shape):
                    break
                shape = shape.larger() if shape.num_workers < self.max_workers else None
            self.best[kind] = shape

    def is_enough(self, shape: Shape) -> bool:
        """Whether so many requests are good there."""
        return self.outcomes(shape).good >= self.good

    def outcomes(self, shape: Shape) -> Outcomes:
        """What the fleet gives; run once."""
        if shape not in self.tried:
            self.tried[shape] = self.run(shape)
        return self.tried[shape]

    def smallest(self, shape_of: Callable[[int], Shape], least: int, most: int) -> int | None:
        """The least size from `least` to `most` that is enough: up by doubling, then by bisection; None: none is."""
        least = max(least, 1)
        if least > most:
            return None
        below, size = least - 1, least
        while not self.is_enough(shape_of(size)):
            if size == most:
                return None
            below, size = size, min(2 * size, most)
        while size - below > 1:
            middle = (below + size) // 2
            if self.is_enough(shape_of(middle)):
                size = middle
            else:
                below = middle
        return size

    def colocated(self, least: int) -> Shape | None:
        """The cheapest fleet whose workers each compute their own prompts."""
        size = self.smallest(lambda size: Shape(0, size), least, self.max_workers)
        return None if size is None else Shape(0, size)

    def split(self, least: int) -> Shape | None:
        """The cheapest fleet of prefill and decode workers, of at least two."""
        best: Shape | None = None
        most = self.max_workers
        for share in _SHARES:
            size = self.smallest(partial(_split_of, share), max(least, 2), most)
            if size is not None:
                best, most = _split_of(share, size), size
        while best is not None and best.num_workers > max(least, 2):
            smaller = self._climb(best.num_workers - 1, best.num_prefill / best.num_workers)
            if smaller is None:
                break
            best = smaller
        return best

    def elastic(self, least: int, split: Shape | None) -> Shape | None:
        """The cheapest fleet whose workers bend; they begin in the proportions of the cheapest fixed ones."""
        share = split.num_prefill / split.num_workers if split is not None else 1 / 2

        def shape_of(size: int) -> Shape:
            fixed = _split_of(share, size)
            return Shape(fixed.num_prefill, fixed.num_decode, is_elastic=True)

        size = self.smallest(shape_of, max(least, 2), self.max_workers)
        return None if size is None else shape_of(size)

    def _climb(self, size: int, share: float) -> Shape | None:
        """A split of so many workers that is enough, climbed to from that share; None: the top is not."""
        place = _split_of(share, size).num_prefill
        while True:
            near = [num for num in (place, place - 1, place + 1) if 0 < num < size]
            best = max(near, key=lambda num: self.outcomes(Shape(num, size - num)).good)
            if self.is_enough(Shape(best, size - best)):
                return Shape(best, size - best)
            if best == place or self.outcomes(Shape(best, size - best)).good == self.outcomes(_split(size, place)).good:
                return None
            place = best


def _split_of(share: float, size: int) -> Shape:
    """So many workers, of which about that share prefills, and at least one of each kind is there."""
    return _split(size, min(max(round(size * share), 1), size - 1))


def _split(size: int, num_prefill: int) -> Shape:
    return Shape(num_prefill, size - num_prefill)


def least_workers(workload: Workload, setup: Setup, good: float) -> int:
    """Workers that no fleet can do with fewer of: the prompts' and streams' own time over that of the arrivals.

    Without any prefix in a cache this is a bound; where there may be, only the streams' time counts.
    """
    requests: Sequence[tuple[int, int]] = [(r.num_prompt_tokens, r.num_output_tokens) for r in workload.requests]
    # Good ones may be the lightest, and the last ones may be computed behind the last arrival.
    seconds = sorted((n - 1) * setup.rates.running_s for _, n in requests)
    needed = sum(seconds[: math.floor(len(seconds) * good)])
    return max(1, math.floor(needed / (2 * workload.span_s)))
