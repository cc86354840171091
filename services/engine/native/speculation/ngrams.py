"""Guesses what follows from the text itself, and learns from what came of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.native.speculation.lengths import Acceptance, Row, choose_lengths
from services.engine.native.speculation.prompt_lookup import PromptLookup
from services.engine.native.speculation.speculation import Candidate, Guesses, Plan
from services.rates import RateLearner, StepShape


class NgramGuesses:
    """Those of one request."""

    def __init__(self, num_tokens: int, lookup: PromptLookup) -> None:
        self._num_tokens, self._lookup = num_tokens, lookup
        self.acceptance = Acceptance()
        self.latest: tuple[int, ...] = ()
        """What may follow the tokens that it knows of, as far as it goes."""

    def guess(self, token_ids: Sequence[int]) -> None:
        """Guess anew what follows."""
        self.latest = self._lookup.guess(token_ids, self._num_tokens)

    def came(self, token_ids: Sequence[int], num_tried: int) -> None:
        """Learn from it, whatever was tried."""
        self.acceptance.learn(self.latest, token_ids)
        self.latest = ()

    def lose_blocks(self) -> None:
        """The text is not in them."""


@dataclass
class NgramSpeculation:
    """Chooses the guesses of a step, by how long the steps before it took."""

    num_tokens: int  # guessed for a sequence in a step at most
    lookup_min: int  # tokens of an n-gram
    lookup_max: int
    rates: RateLearner

    def new_guesses(self) -> NgramGuesses:
        """Of a request that generates for the first time here."""
        return NgramGuesses(self.num_tokens, PromptLookup(self.lookup_min, self.lookup_max))

    def plan(self, candidates: Sequence[Candidate], max_guesses: int, shape: StepShape) -> Plan:
        """The guesses to try for each candidate, `max_guesses` in all at most; `shape`: the step without them."""
        known = [_of(each.guesses) for each in candidates]
        for guesses, each in zip(known, candidates, strict=True):
            guesses.guess(each.token_ids)
        rows = [
            Row(guesses.acceptance.rate, min(len(guesses.latest), each.max_guesses), len(each.token_ids))
            for guesses, each in zip(known, candidates, strict=True)
        ]
        lengths = choose_lengths(rows, max_guesses, shape, self.rates.rates)
        return Plan([guesses.latest[:length] for guesses, length in zip(known, lengths, strict=True)])


def _of(guesses: Guesses) -> NgramGuesses:
    assert isinstance(guesses, NgramGuesses)
    return guesses
