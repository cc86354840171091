"""Keeps account of a window of requests: what has come in, and what clients got of their objectives. Pure.

A second has a tally; a window is the sum of its seconds, and several routers' windows add up in the same way. What is
kept does not grow with the number of requests: times go into buckets, each a little wider than the one below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from services.router.finished import Finished
from services.router.roles.measurements import Attainment, Demand

_PER_DOUBLING: Final = 16
"""Buckets: a percentile is off by 4 % at most."""
_LEAST, _MOST = -6 * _PER_DOUBLING, 10 * _PER_DOUBLING
_PERCENTILE: Final = 0.9
_LATE: Final = 1.0


class Tally(msgspec.Struct):
    """Counts of one model's sequences."""

    arrivals_per_s: float = 0.0
    num_arrived: int = 0
    num_arrived_tokens: int = 0
    """Of their prompts."""
    num_ended: int = 0
    """Regularly: one that failed says nothing of how fast it would have been."""
    num_ttft_met: int = 0
    num_tpot_met: int = 0
    num_prompt_tokens: int = 0
    """Of those that have ended."""
    num_cached_tokens: int = 0
    """Of these."""
    num_output_tokens: int = 0
    num_queued_tokens: float = 0.0
    """Of prompts that wait in the router now."""
    ttft: dict[int, int] = {}
    """Sequences by bucket of their time to first token, in parts of its objective: those that have one."""
    tpot: dict[int, int] = {}

    def add(self, other: Tally) -> None:
        """The other one's counts, too."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for own, others in ((self.ttft, other.ttft), (self.tpot, other.tpot)):
            for bucket, count in others.items():
                own[bucket] = own.get(bucket, 0) + count


_COUNTS: Final = tuple(name for name in Tally.__struct_fields__ if name not in ("ttft", "tpot"))


class Ledger:
    """One router's, of all its models. Event loop only."""

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._window_s = window_s
        self._clock = clock
        self._began_s = clock()
        self._seconds: dict[str, dict[int, Tally]] = {}  # by model, then by second, the oldest first

    def arrived(self, model: str, num_sequences: int, num_prompt_tokens: int) -> None:
        """A request has come in, whatever becomes of it."""
        tally = self._now(model)
        tally.num_arrived += num_sequences
        tally.num_arrived_tokens += num_prompt_tokens

    def finished(self, finished: Finished) -> None:
        """A sequence has ended."""
        if finished.finish_reason == "error" or finished.ttft_s is None:
            return
        tally, objectives = self._now(finished.model), finished.objectives
        tally.num_ended += 1
        tally.num_prompt_tokens += finished.num_prompt_tokens
        tally.num_cached_tokens += min(finished.num_cached_tokens, finished.num_prompt_tokens)
        tally.num_output_tokens += finished.num_generated_tokens
        ttft, tpot = finished.ttft_s / objectives.ttft_s, (finished.tpot_s or 0.0) / objectives.tpot_s
        tally.num_ttft_met += ttft <= _LATE
        tally.num_tpot_met += tpot <= _LATE
        for buckets, seconds, objective_s in (
            (tally.ttft, finished.ttft_s, objectives.ttft_s),
            (tally.tpot, finished.tpot_s, objectives.tpot_s),
        ):
            if seconds is not None and objective_s < math.inf:  # else it says nothing of what the others get
                bucket = _bucket(seconds / objective_s)
                buckets[bucket] = buckets.get(bucket, 0) + 1

    def window(self, models: Iterable[str], num_queued_tokens: float) -> Tally:
        """The last seconds of these models together."""
        now_s, total = self._clock(), Tally()
        for model in models:
            seconds = self._seconds.get(model, {})
            for second in [each for each in seconds if each < now_s - self._window_s]:
                del seconds[second]
            for tally in seconds.values():
                total.add(tally)
        total.arrivals_per_s = total.num_arrived / max(min(self._window_s, now_s - self._began_s), 1.0)
        total.num_queued_tokens = num_queued_tokens
        return total

    def _now(self, model: str) -> Tally:
        seconds, second = self._seconds.setdefault(model, {}), math.floor(self._clock())
        if second not in seconds:
            seconds[second] = Tally()
            if len(seconds) > self._window_s + 2:
                del seconds[next(iter(seconds))]
        return seconds[second]


def _bucket(ratio: float) -> int:
    """Bucket b holds what is up to 2^(b / 16)."""
    return math.ceil(min(max(_PER_DOUBLING * math.log2(ratio), _LEAST), _MOST)) if ratio > 0 else _LEAST


def _percentile(buckets: dict[int, int]) -> float:
    rank, num_below = _PERCENTILE * sum(buckets.values()), 0
    for bucket in sorted(buckets):
        num_below += buckets[bucket]
        if num_below >= rank:
            return float(2 ** (min(bucket, _MOST) / _PER_DOUBLING)) if bucket > _LEAST else 0.0
    return 0.0


def attainment_of(tally: Tally) -> Attainment | None:
    """None: nobody has ended."""
    if not tally.num_ended:
        return None
    ratios = _percentile(tally.ttft), _percentile(tally.tpot)
    return Attainment(tally.num_ended, tally.num_ttft_met, tally.num_tpot_met, *ratios)


def demand_of(tally: Tally) -> Demand | None:
    """None: requests come in, and how long their answers are is not known yet."""
    if not tally.num_arrived:
        return Demand(0.0, 0.0, 0.0, 0.0)
    if not tally.num_ended:
        return None
    prompt, cached = tally.num_arrived_tokens / tally.num_arrived, tally.num_cached_tokens / tally.num_prompt_tokens
    return Demand(
        tally.arrivals_per_s, prompt * (1 - cached), prompt * cached, tally.num_output_tokens / tally.num_ended
    )
