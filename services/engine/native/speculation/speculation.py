"""Guesses tokens for a step's sequences, and learns from what came of them. Pure: seconds are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.engine.native.speculation.lengths import Acceptance, Row, choose_lengths
from services.engine.native.speculation.prompt_lookup import PromptLookup
from services.rates import RateLearner, StepShape


@dataclass(frozen=True)
class SpeculationConfig:
    """What guesses are made of."""

    num_tokens: int  # guessed for a sequence in a step at most
    lookup_min: int  # tokens of an n-gram
    lookup_max: int


class Guesses:
    """Those of one request; it keeps them as long as it lives, wherever it stands."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._num_tokens = config.num_tokens
        self._lookup = PromptLookup(config.lookup_min, config.lookup_max)
        self.acceptance = Acceptance()
        self.latest: tuple[int, ...] = ()
        """What may follow the tokens that it knows of, as far as it goes."""

    def guess(self, token_ids: Sequence[int]) -> None:
        """Guess anew what follows."""
        self.latest = self._lookup.guess(token_ids, self._num_tokens)

    def came(self, token_ids: Sequence[int]) -> None:
        """These followed."""
        self.acceptance.learn(self.latest, token_ids)
        self.latest = ()


@dataclass(frozen=True)
class Candidate:
    """A sequence of a step that generates."""

    token_ids: Sequence[int]  # of which the step computes the last one
    guesses: Guesses
    max_guesses: int  # that its limits and its blocks allow


@dataclass
class Speculation:
    """Chooses the guesses of a step, by how long the steps before it took."""

    config: SpeculationConfig
    rates: RateLearner = field(default_factory=RateLearner)

    def guess(self, candidates: Sequence[Candidate], max_guesses: int, shape: StepShape) -> list[tuple[int, ...]]:
        """The guesses to try for each candidate, `max_guesses` in all at most; `shape`: the step without them."""
        for each in candidates:
            each.guesses.guess(each.token_ids)
        rows = [
            Row(each.guesses.acceptance.rate, min(len(each.guesses.latest), each.max_guesses), len(each.token_ids))
            for each in candidates
        ]
        lengths = choose_lengths(rows, max_guesses, shape, self.rates.rates)
        return [each.guesses.latest[:length] for each, length in zip(candidates, lengths, strict=True)]
