"""Predicts how short of its objective each side of a fleet would be with other roles or budgets. Pure.

A fluid model of what arrives, by the workers' mean rates. Work is measured in workers: 1.5 takes one and a half.

    prefill   A = requests/s x seconds of a prompt; capacity = prefill workers + what decode workers may do beside their
              streams; waits as in a queue M/M/c by Sakasegawa's approximation (Naval Research Logistics 24, 1977)
    decode    U = output tokens/s x seconds of a token beside others. A step of one of n workers takes
              base / (1 - U/n - x), where x of its time goes to prompts: the longer a step, the more streams there are
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from services.budgets import MIN_CHUNK, Budgets, Objectives, Role
from services.rates import Rates
from services.router.roles.measurements import Demand

_TAIL: Final = math.log(10)
"""From a mean wait to its 90th percentile, as waits in queues are distributed: exponentially."""
_FULL: Final = 0.85
"""Of prefill workers' time, what is used before the router gives prompts to decode workers."""
_ENDLESS: Final = 0.99
MOST: Final = 1e6
"""A pressure is never larger: that says enough."""


@dataclass(frozen=True)
class Split:
    """How a fleet would be divided: counts of workers, and the budgets of those that decode."""

    num_prefill: int
    num_decode: int
    budgets: Budgets


@dataclass(frozen=True)
class Load:
    """What a fleet has to bear, whoever bears it."""

    demand: Demand
    rates: Rates
    backlog_s: float
    """Work that waits: seconds of one worker."""
    max_running: float
    """Of one worker, on average."""
    num_kv_tokens: float
    horizon_s: float
    """How far a queue that grows without end is looked at."""

    @property
    def prompt_s(self) -> float:
        """Of a prompt, once it is begun."""
        demand = self.demand
        return self.rates.base_s + self.rates.prompt_s(round(demand.prompt_tokens), round(demand.cached_tokens))

    @property
    def context_tokens(self) -> float:
        """Of a stream, half-way."""
        return self.demand.cached_tokens + self.demand.prompt_tokens + self.demand.output_tokens / 2

    @property
    def prefill_work(self) -> float:
        return self.demand.requests_per_s * self.prompt_s

    @property
    def tokens_per_s(self) -> float:
        return self.demand.requests_per_s * self.demand.output_tokens

    @property
    def decode_work(self) -> float:
        return self.tokens_per_s * (self.rates.running_s + self.rates.context_token_s * self.context_tokens)


@dataclass(frozen=True)
class Pressures:
    """How much of its objective each side uses: above 1 it is missed."""

    prefill: float
    decode: float

    def of(self, side: Role) -> float:
        return self.prefill if side == "prefill" else self.decode


def predict(split: Split, load: Load, objectives: Objectives) -> Pressures:
    """The pressures once the fleet has been divided that way for a while."""
    most_beside = _beside_streams(split, load)
    capacity = split.num_prefill + split.num_decode * most_beside
    prefill = decode = MOST  # of a side that nobody works for
    if capacity > 0:
        wait_s = max(_TAIL * _queue_s(split.num_prefill, capacity, load), load.backlog_s / capacity)
        prefill = (load.prompt_s + wait_s) / objectives.ttft_s
    if split.num_decode:
        excess = max(load.prefill_work - _FULL * split.num_prefill, 0) / split.num_decode
        decode = _decode_pressure(split, load, min(most_beside, excess), objectives.tpot_s)
    return Pressures(min(prefill, MOST), min(decode, MOST))


def _decode_pressure(split: Split, load: Load, beside: float, tpot_s: float) -> float:
    """The worst of steps, seats and blocks; `beside`: the part of its time that a worker gives to prompts."""
    used = load.decode_work / split.num_decode + beside
    # More streams come than can be borne from some point on; worse is worse all the same.
    step_s = load.rates.base_s / (1 - min(used, _ENDLESS)) * max(used / _ENDLESS, 1)
    streams = load.tokens_per_s / split.num_decode * step_s
    return max(step_s / tpot_s, streams / load.max_running, streams * load.context_tokens / load.num_kv_tokens)


def _beside_streams(split: Split, load: Load) -> float:
    """The part of a decode worker's time that its budgets leave to prompts."""
    free = 1 - load.decode_work / split.num_decode if split.num_decode else 0.0
    if free <= 0:
        return 0.0
    token_s = load.rates.prompt_s(1, round(load.demand.cached_tokens + load.demand.prompt_tokens / 2))
    # A step that is given so many seconds of prompts takes (base + seconds) / free.
    seconds = min(split.budgets.tpot_s * free - load.rates.base_s, split.budgets.prompt_tokens * token_s)
    carries_any = seconds > 0 and split.budgets.prompt_tokens >= MIN_CHUNK
    return seconds * free / (load.rates.base_s + seconds) if carries_any else 0.0


def _queue_s(num_workers: int, capacity: float, load: Load) -> float:
    """Mean wait; of a queue that grows without end, what it grows to within the horizon."""
    used = load.prefill_work / capacity
    endless_s = load.horizon_s * used
    if used >= 1:
        return endless_s
    busy = float(used ** (math.sqrt(2 * (max(num_workers, 1) + 1)) - 1))
    return min(load.prompt_s / capacity * busy / (1 - used), endless_s)
