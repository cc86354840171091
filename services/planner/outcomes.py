"""Computes what a simulated fleet gave its clients: good requests, goodput, percentiles, how busy its workers were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from services.budgets import Objectives
from services.planner.fleet import Shape
from services.planner.job import Outcome

_BINS_PER_E: Final = 100  # a bin is one per cent wide
_LEAST_S: Final = 1e-6


class Percentiles(NamedTuple):
    """Seconds; nan where nothing was measured."""

    p50: float
    p90: float
    p99: float


class Gaps:
    """The times between tokens of an answer, all answers together, counted in bins of one per cent."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, seconds: float, num_tokens: int) -> None:
        """So many tokens came so long after the one before."""
        place = int(math.log(seconds / _LEAST_S) * _BINS_PER_E) if seconds > _LEAST_S else 0
        self._counts[place] = self._counts.get(place, 0) + num_tokens

    def percentiles(self) -> Percentiles:
        """The middle of the bin that each falls into."""
        if not self._counts:
            return Percentiles(math.nan, math.nan, math.nan)
        places = np.array(sorted(self._counts))
        up_to = np.cumsum([self._counts[place] for place in places.tolist()])
        found = (places[np.searchsorted(up_to, share * up_to[-1])] for share in (0.5, 0.9, 0.99))
        return Percentiles(*(_LEAST_S * math.exp((place + 0.5) / _BINS_PER_E) for place in found))


@dataclass(frozen=True)
class Outcomes:
    """A run's result."""

    shape: Shape
    objectives: Objectives
    outcomes: Sequence[Outcome]
    gaps: Gaps
    span_s: float
    """Of the arrivals."""
    duration_s: float
    prefill_busy_s: float
    decode_busy_s: float
    num_steps: int
    num_flips: int = 0
    """Roles of elastic workers that were changed."""
    num_redirects: int = 0
    """Prompts that went on elsewhere."""

    @property
    def num_requests(self) -> int:
        return len(self.outcomes)

    @property
    def num_refused(self) -> int:
        return sum(each.first_s < 0 for each in self.outcomes)

    @cached_property
    def num_good(self) -> int:
        """Requests that meet both objectives."""
        ttft_s, tpot_s = self.objectives.ttft_s, self.objectives.tpot_s
        return sum(each.first_s >= 0 and each.ttft_s <= ttft_s and each.tpot_s <= tpot_s for each in self.outcomes)

    @property
    def good(self) -> float:
        """Their share."""
        return self.num_good / max(self.num_requests, 1)

    @property
    def goodput(self) -> float:
        """Good requests per second of the arrivals."""
        return self.num_good / self.span_s

    @cached_property
    def ttft(self) -> Percentiles:
        return _percentiles([each.ttft_s for each in self.outcomes if each.first_s >= 0])

    @cached_property
    def tpot(self) -> Percentiles:
        return _percentiles([each.tpot_s for each in self.outcomes if each.first_s >= 0 and each.num_output_tokens > 1])

    @cached_property
    def itl(self) -> Percentiles:
        return self.gaps.percentiles()

    @property
    def cached_share(self) -> float:
        """Of the prompt tokens, those that were found in a cache."""
        return sum(each.num_cached_tokens for each in self.outcomes) / max(
            sum(each.num_prompt_tokens for each in self.outcomes), 1
        )

    @property
    def prefill_utilisation(self) -> float:
        """The share of the time that prefill workers are in steps; nan where there are none."""
        return _share(self.prefill_busy_s, self.shape.num_only_prefill * self.duration_s)

    @property
    def decode_utilisation(self) -> float:
        """Of the others."""
        num_others = self.shape.num_workers - self.shape.num_only_prefill
        return _share(self.decode_busy_s, num_others * self.duration_s)


def _percentiles(seconds: Sequence[float]) -> Percentiles:
    if not seconds:
        return Percentiles(math.nan, math.nan, math.nan)
    values: npt.NDArray[np.float64] = np.percentile(np.array(seconds), (50, 90, 99))
    return Percentiles(*values.tolist())


def _share(busy_s: float, of_s: float) -> float:
    return busy_s / of_s if of_s else math.nan
