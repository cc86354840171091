"""Observes how long a model's answers are, since what clients allow them says little of that."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 0.05  # of a new one: a memory of the last twenty or so


class AnswerLengths:
    """The mean number of tokens, by model."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def observe(self, model: str, num_tokens: int) -> None:
        """An answer has ended with so many. `model` is a served name: the number of these stays small."""
        mean = self._means.get(model, float(num_tokens))
        self._means[model] = mean + _WEIGHT * (num_tokens - mean)

    def expected(self, model: str, most: int) -> float:
        """Tokens of an answer that may have so many; all of them, where none was seen."""
        return min(self._means.get(model, float(most)), float(most))
