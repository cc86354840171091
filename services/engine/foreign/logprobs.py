"""Says another engine's log probabilities in ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.engine.request import PositionLogprobs, TokenLogprob


def position_logprobs(ids: Sequence[Any], values: Sequence[Any], rank: int) -> PositionLogprobs:
    """Of one position: first stands the token that was taken, of this rank, then the most likely ones, in order."""
    chosen, *top = (TokenLogprob(int(i), float(value), 0) for i, value in zip(ids, values, strict=True))
    return PositionLogprobs(
        TokenLogprob(chosen.token_id, chosen.logprob, rank),
        tuple(TokenLogprob(each.token_id, each.logprob, place) for place, each in enumerate(top, 1)),
    )
