"""Decides by the expected time to first token whether a request is let in. Pure.

    expected = tokens ahead of it in the router's queue / tokens a second at which that drains
             + (tokens in front at the best worker + its own) at that worker's rates, and the spread of these

What cannot meet its deadline is refused while that is still news: the client may try elsewhere or later, and nobody
computes a prompt whose answer comes too late. Retry-After is the time by which the backlog is too long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.rates import Rates

_MAX_RETRY_AFTER_S = 600


@dataclass(frozen=True)
class Estimate:
    """What the time to first token of a new request is made of, in seconds."""

    queue_s: float
    """In the router, before it is sent to a worker."""
    worker_s: float
    """In the worker's queue."""
    own_s: float
    """Its own prompt."""

    @property
    def total_s(self) -> float:
        return self.queue_s + self.worker_s + self.own_s


def expected_ttft(
    num_ahead_tokens: float, drain_per_s: float, num_front_tokens: float, num_own_tokens: float, rates: Rates
) -> Estimate:
    """Estimate it. `num_ahead_tokens`: in the router's queue; `num_front_tokens`: at the worker that has fewest.

    A worker that has learnt nothing yet is taken at the guess, without a spread: nothing is refused for our ignorance
    of it alone.
    """
    margin = 1 + rates.spread if rates.num_steps else 1.0
    front_s = rates.prompt_s(math.ceil(num_front_tokens))
    own_s = rates.base_s + rates.prompt_s(math.ceil(num_own_tokens))
    return Estimate(num_ahead_tokens / drain_per_s, margin * front_s, margin * own_s)


def is_hopeless(estimate: Estimate, left_s: float, is_clients_own: bool) -> bool:
    """Whether it cannot be expected to have its first token within `left_s`.

    A deadline of the server's bounds what a request waits for others: a prompt that is merely long is served by an idle
    fleet. One that the client gave (`is_clients_own`) counts whole.
    """
    own_s = estimate.own_s if is_clients_own or estimate.queue_s or estimate.worker_s else 0.0
    return estimate.queue_s + estimate.worker_s + own_s > left_s


def retry_after_s(estimate: Estimate, left_s: float) -> int:
    """By when the backlog has drained so far that the same request would be let in: whole seconds, at least 1."""
    return min(max(math.ceil(estimate.total_s - left_s), 1), _MAX_RETRY_AFTER_S)
