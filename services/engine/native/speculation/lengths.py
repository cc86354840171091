"""Decides how many guessed tokens a step tries, for each of its sequences: those that pay. Pure.

A guess costs its share of the step and brings a token if it comes true. It is tried if it raises the tokens that the
step is expected to bring in a second: so a step that waits for memory tries many, and one that a large batch keeps
computing tries those alone that are nearly certain, or none.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from services.rates import Rates, StepShape

_FIRST = 0.5
_WEIGHT = 0.1


class Acceptance:
    """How probably a guess of one request comes true, those before it in its step having come true.

    A moving average over its last ten guesses or so, tried or not: what was not tried is held against what came, too.
    """

    def __init__(self) -> None:
        self.rate = _FIRST

    def learn(self, guesses: Sequence[int], came: Sequence[int]) -> None:
        """Learn from what stands where the guesses would stand, up to the first that is wrong."""
        for guess, token_id in zip(guesses, came, strict=False):
            self.rate += _WEIGHT * ((guess == token_id) - self.rate)
            if guess != token_id:
                return


@dataclass(frozen=True)
class Row:
    """A sequence that generates: one token in the step for certain, and as many more as guesses come true."""

    acceptance: float  # of each guess, those before it having come true
    max_guesses: int
    num_context_tokens: int


def choose_lengths(rows: Sequence[Row], max_guesses: int, shape: StepShape, rates: Rates) -> list[int]:
    """The number of guesses to try in each row, at most `max_guesses` in all, beside the work of `shape`.

    Expected tokens over expected seconds, at its largest: guesses come in by falling probability for their cost, for as
    long as the ratio rises by the next one. Each has a smaller one than the ratio of all before it from then on, so no
    other choice has a larger (fractional programming: Dinkelbach 1967).
    """
    lengths = [0] * len(rows)
    costs = [rates.running_s + rates.context_token_s * row.num_context_tokens for row in rows]
    tokens, seconds = float(len(rows)), rates.step_s(shape)
    worth = [
        (-row.acceptance / cost, index)
        for index, (row, cost) in enumerate(zip(rows, costs, strict=True))
        if row.max_guesses
    ]
    heapq.heapify(worth)
    while worth and sum(lengths) < max_guesses:
        negative, index = heapq.heappop(worth)
        if -negative * seconds <= tokens:
            break
        row, cost = rows[index], costs[index]
        lengths[index] += 1
        tokens, seconds = tokens - negative * cost, seconds + cost
        if lengths[index] < row.max_guesses:
            heapq.heappush(worth, (negative * row.acceptance, index))
    return lengths
