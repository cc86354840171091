"""When fetching a prefix beats computing it, from what was measured here: pure, no clock, no I/O.

    fetch    overhead + bytes / bandwidth of that holder
    compute  tokens / prefill rate

All three are exponentially weighted means of observations; until there is one, the stated guesses serve. They are on
fetching's side: a wrong first guess costs one slow fetch and is corrected by it, while a fetch that is never tried
corrects nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

# Weight of a new observation.
_WEIGHT = 0.3
# Smaller fetches tell more about the overhead than about bandwidth, and the other way round.
_OVERHEAD_BYTES = 256 * 1024
# Holders come and go with every restart.
_MAX_HOLDERS = 1024


class FetchPolicy(Enum):
    """MEASURED: where a fetch is expected to take less time than computing."""

    MEASURED = "measured"
    ALWAYS = "always"
    NEVER = "never"


@dataclass
class FetchCosts:
    """Of one worker. Seconds, bytes, tokens."""

    policy: FetchPolicy = FetchPolicy.MEASURED
    overhead_s: float = 0.002
    bandwidth_bytes_per_s: float = 2e9  # of a holder that nothing was fetched from yet
    prefill_tokens_per_s: float | None = None  # nothing computed yet: fetch
    min_piece_bytes: int = 64 * 1024 * 1024
    piece_s: float = 0.25
    _bandwidth_of: dict[str, float] = field(default_factory=dict)

    def fetching_pays(self, holder_id: str, num_tokens: int, num_bytes: int) -> bool:
        """Whether these tokens' blocks are to be fetched rather than computed."""
        if self.policy is not FetchPolicy.MEASURED:
            return self.policy is FetchPolicy.ALWAYS
        if self.prefill_tokens_per_s is None:
            return True
        return self.fetch_s(holder_id, num_bytes) < num_tokens / self.prefill_tokens_per_s

    def piece_bytes(self, holder_id: str) -> int:
        """How much to fetch under one lease: what a holder's death or the deadline can undo.

        Each piece waits for both engines' steps, so it is `piece_s` long at least, and not small where the bandwidth
        that was observed was mostly such a wait.
        """
        return max(self.min_piece_bytes, int(self.piece_s * self._bandwidth_of.get(holder_id, 0.0)))

    def fetch_s(self, holder_id: str, num_bytes: int) -> float:
        """Expected seconds of a fetch."""
        return self.overhead_s + num_bytes / self._bandwidth_of.get(holder_id, self.bandwidth_bytes_per_s)

    def fetched(self, holder_id: str, num_bytes: int, seconds: float) -> None:
        """A fetch has taken so long."""
        if num_bytes < _OVERHEAD_BYTES:
            self.overhead_s += _WEIGHT * (seconds - self.overhead_s)
            return
        bandwidth = num_bytes / max(1e-6, seconds - self.overhead_s)
        old = self._bandwidth_of.get(holder_id, bandwidth)
        self._bandwidth_of.pop(holder_id, None)
        self._bandwidth_of[holder_id] = old + _WEIGHT * (bandwidth - old)  # last: of too many, the first is forgotten
        if len(self._bandwidth_of) > _MAX_HOLDERS:
            del self._bandwidth_of[next(iter(self._bandwidth_of))]

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that computed prompts has taken so long."""
        rate = num_tokens / max(1e-6, seconds)
        old = self.prefill_tokens_per_s or rate
        self.prefill_tokens_per_s = old + _WEIGHT * (rate - old)
