"""Decides by the expected time to first token whether a request is let in. Pure.

    expected = tokens ahead of it in the router's queue / tokens a second at which that drains
             + (tokens in front at the best worker + its own) at that worker's rates, and the spread of these
             + what requests took beyond that lately, from their grant to their first token: its mean and two deviations

What cannot meet its deadline is refused while that is still news: the client may try elsewhere or later, and nobody
computes a prompt whose answer comes too late. Retry-After is the time by which the backlog is too long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.rates import Rates

_MAX_RETRY_AFTER_S = 600
_QUEUE_MARGIN = 1.4  # queues drain in clumps, and one refused after it has waited is worse than one refused at once
_SURPLUS_WEIGHT = 0.06  # of a new one: a memory of the last dozen or two
_USUAL = 4.0  # deviations from the mean
_LEAST_REACH_S = 0.05
_FRESH_S, _FORGOTTEN_S = 2.0, 4.0  # without news: how long it stands, and then falls to 1/e


@dataclass(frozen=True)
class Estimate:
    """What the time to first token of a new request is made of, in seconds."""

    queue_s: float
    """In the router, before it is sent to a worker."""
    worker_s: float
    """In the worker's queue."""
    own_s: float
    """Its own prompt."""
    surplus_s: float = 0.0
    """Beyond these: steps that others share, the way to the workers and back, handoffs."""

    @property
    def total_s(self) -> float:
        return self.queue_s + self.worker_s + self.own_s + self.surplus_s


class Surplus:
    """How much longer than reckoned first tokens take, once a request is sent to a worker.

    One that is far off counts as the farthest of the usual: a stall is no rule, and what becomes the rule is soon
    usual. What nothing confirms is forgotten in seconds, or who is refused for it would never be let in to disprove it.
    """

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._at_s = 0.0

    def observe(self, seconds: float, now_s: float) -> None:
        """It was so much, perhaps less than nothing."""
        self._fade(now_s)
        reach_s = _USUAL * self._deviation_s + _LEAST_REACH_S
        seconds = min(max(seconds, self._mean_s - reach_s), self._mean_s + reach_s)
        self._deviation_s += _SURPLUS_WEIGHT * (abs(seconds - self._mean_s) - self._deviation_s)
        self._mean_s += _SURPLUS_WEIGHT * (seconds - self._mean_s)

    def likely_s(self, now_s: float) -> float:
        """What to reckon with: more comes to few."""
        return (self._mean_s + 2 * self._deviation_s) * self._kept(now_s)

    def _kept(self, now_s: float) -> float:
        return math.exp(-max(now_s - self._at_s - _FRESH_S, 0.0) / _FORGOTTEN_S)

    def _fade(self, now_s: float) -> None:
        kept = self._kept(now_s)
        self._mean_s *= kept
        self._deviation_s *= kept
        self._at_s = now_s


def expected_ttft(
    num_ahead_tokens: float,
    drain_per_s: float,
    num_front_tokens: float,
    num_own_tokens: float,
    rates: Rates,
    surplus_s: float = 0.0,
) -> Estimate:
    """Estimate it. `num_ahead_tokens`: in the router's queue; `num_front_tokens`: at the worker that has fewest.

    A worker that has learnt nothing yet is taken at the guess, without a spread: nothing is refused for our ignorance
    of it alone.
    """
    margin = 1 + rates.spread if rates.num_steps else 1.0
    front_s = rates.prompt_s(math.ceil(num_front_tokens))
    own_s = rates.base_s + rates.prompt_s(math.ceil(num_own_tokens))
    worker_s, own_s = margin * front_s, margin * own_s
    # A surplus below nothing takes off at most what was reckoned for the worker.
    queue_s = _QUEUE_MARGIN * num_ahead_tokens / drain_per_s
    return Estimate(queue_s, worker_s, own_s, max(surplus_s, -(worker_s + own_s)))


def is_hopeless(estimate: Estimate, left_s: float, is_clients_own: bool) -> bool:
    """Whether it cannot be expected to have its first token within `left_s`.

    A deadline of the server's bounds what a request waits for others: a prompt that is merely long is served by an idle
    fleet. One that the client gave (`is_clients_own`) counts whole.
    """
    is_alone = not estimate.queue_s and not estimate.worker_s
    return (is_clients_own or not is_alone) and estimate.total_s > left_s


def retry_after_s(estimate: Estimate, left_s: float) -> int:
    """By when the backlog has drained so far that the same request would be let in: whole seconds, at least 1."""
    return min(max(math.ceil(estimate.total_s - left_s), 1), _MAX_RETRY_AFTER_S)
