"""Decides whether a worker fetches or computes a prefix, and how much it fetches at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.rates import RateLearner, tokens_of

_MIN_PIECE_BYTES: Final = 64 * 1024 * 1024
_PIECE_S: Final = 0.25


@dataclass(frozen=True)
class FetchCosts:
    """Decides from what a worker has learnt. Until it has computed anything it fetches: a wrong first guess costs one
    slow fetch and is corrected by it, while a fetch that is never tried corrects nothing.
    """

    learner: RateLearner
    bytes_per_token: int
    policy: str = "measured"  # fetch where it takes less time than computing; "always"; "never"

    def fetching_pays(self, holder_id: str, tier: str, num_tokens: int, start: int) -> bool:
        """Whether the prompt's tokens from position `start` on are to be fetched rather than computed."""
        rates = self.learner.rates
        if self.policy != "measured" or not rates.num_steps:
            return self.policy != "never"
        return rates.fetching_pays(tokens_of(tier, num_tokens), start, self.learner.slowness(holder_id))

    def piece_tokens(self, holder_id: str, tier: str) -> int:
        """Return how much to fetch under one lease: what a holder's death or the deadline can undo.

        Each piece waits for both engines' steps, so it takes `_PIECE_S` at least, and not small where what was
        observed was mostly such a wait.
        """
        smallest = max(1, _MIN_PIECE_BYTES // self.bytes_per_token)
        rates = self.learner.rates
        if not rates.num_fetches:
            return smallest
        one_s = rates.fetch_s(tokens_of(tier, smallest)) / smallest * self.learner.slowness(holder_id)
        return max(smallest, int(_PIECE_S / one_s))
