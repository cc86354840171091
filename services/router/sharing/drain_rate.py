"""Measures how fast a queue drains while it is backlogged. Pure: the clock is the caller's."""

from __future__ import annotations

import math

_MEMORY_S = 5.0  # of what was measured; older falls to 1/e
_PRIOR_S = 0.5  # the weight of the rate that is reckoned before anything was measured


class DrainRate:
    """Tokens a second that leave a queue which is not empty. Whatever holds them up (prompts to compute, places in a
    batch, KV memory), this is what a new one will wait for."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since_s: float | None = None  # when it last left, while others waited

    def left(self, num_tokens: float, now_s: float, is_backlogged: bool) -> None:
        """So many tokens have left at `now_s`; whether others still wait."""
        if self._since_s is not None:
            elapsed = max(now_s - self._since_s, 0.0)
            fading = math.exp(-elapsed / _MEMORY_S)
            self._tokens = self._tokens * fading + num_tokens
            self._seconds = self._seconds * fading + elapsed
        self._since_s = now_s if is_backlogged else None

    def per_s(self, expected_per_s: float, now_s: float) -> float:
        """Tokens a second: as measured, and as `expected_per_s` says where little was. Positive."""
        # What did not leave since the last one is news, too: a queue that stands still gets no faster by waiting.
        stalled_s = max(now_s - self._since_s, 0.0) if self._since_s is not None else 0.0
        tokens = self._tokens + _PRIOR_S * expected_per_s
        return max(tokens / (self._seconds + stalled_s + _PRIOR_S), 1e-9)
