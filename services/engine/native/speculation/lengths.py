"""Decides how many guessed tokens a step tries, for each of its sequences: those that pay. Pure.

A guess costs its share of the step and brings a token if it comes true. It is tried if it raises the tokens that the
step is expected to bring in a second: so a step that waits for memory tries many, and one that a large batch keeps
computing tries those alone that are nearly certain, or none.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.rates import Rates, StepShape

_FIRST = 0.5
_WEIGHT = 0.1


class Acceptance:
    """How probably a guess comes true, those before it in its step having come true: a moving average.

    With the usual weight over the last ten guesses or so of a request.
    """

    def __init__(self, rate: float = _FIRST, weight: float = _WEIGHT) -> None:
        self.rate = rate
        self._weight = weight

    def learn(self, guesses: Sequence[int], came: Sequence[int]) -> None:
        """Learn from what stands where the guesses would stand, up to the first that is wrong, tried or not."""
        pairs = list(zip(guesses, came, strict=False))
        num_true = next((i for i, (guess, token_id) in enumerate(pairs) if guess != token_id), len(pairs))
        self.hear(num_true, ends_wrong=num_true < len(pairs))

    def hear(self, num_true: int, *, ends_wrong: bool) -> None:
        """Learn from so many that came true, and from the one after them, where that did not."""
        for came_true in (*num_true * (True,), *ends_wrong * (False,)):
            self.rate += self._weight * (came_true - self.rate)


@dataclass(frozen=True)
class Row:
    """A sequence that generates: one token in the step for certain, and as many more as guesses come true."""

    acceptance: float  # of each guess, those before it having come true
    max_guesses: int
    num_context_tokens: int

    def expected(self, num_guesses: int) -> float:
        """Of so many guesses, those that are expected to come true."""
        return sum(self.acceptance**place for place in range(1, num_guesses + 1))


def guess_s(row: Row, rates: Rates) -> float:
    """The time that one more token of the sequence takes in a step."""
    return rates.running_s + rates.context_token_s * row.num_context_tokens


def choose_lengths(
    rows: Sequence[Row], max_guesses: int, shape: StepShape, rates: Rates, draft: Rates | None = None
) -> list[int]:
    """The number of guesses to try in each row, at most `max_guesses` in all, beside the work of `shape`.

    `draft`: of the model that makes them, in as many passes as the longest row has guesses; None: they cost nothing.
    With each pass more of them the best ratio of tokens to seconds rises, and then falls for good: guesses of a further
    pass are less probable than those before them and cost the same.
    """
    if draft is None:
        return _lengths(rows, max_guesses, [guess_s(row, rates) for row in rows], rates.step_s(shape))[0]
    costs = [guess_s(row, rates) + guess_s(row, draft) for row in rows]
    best, most = [0] * len(rows), len(rows) / rates.step_s(shape)
    for num_passes in range(1, max((row.max_guesses for row in rows), default=0) + 1):
        cut = [replace(row, max_guesses=min(row.max_guesses, num_passes)) for row in rows]
        lengths, ratio = _lengths(cut, max_guesses, costs, rates.step_s(shape) + num_passes * draft.base_s)
        if ratio <= most:
            break
        best, most = lengths, ratio
    return best


def _lengths(rows: Sequence[Row], max_guesses: int, costs: Sequence[float], seconds: float) -> tuple[list[int], float]:
    """The best numbers of guesses, and the tokens per second that they bring, where a step takes `seconds` without.

    Expected tokens over expected seconds, at its largest: guesses come in by falling probability for their cost, for as
    long as the ratio rises by the next one. Each has a smaller one than the ratio of all before it from then on, so no
    other choice has a larger (fractional programming: Dinkelbach 1967).
    """
    lengths = [0] * len(rows)
    tokens = float(len(rows))
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
    return lengths, tokens / seconds
