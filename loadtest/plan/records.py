"""Defines the record of one request, and its form in locust's messages and JSON files: a plain dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Annotated

import msgspec

_Seconds = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
"""A finite number."""


class Outcome(StrEnum):
    """How a request ended. Refused: the server said 429 or 503, as a server without room should."""

    OK = "ok"
    REFUSED = "refused"
    ERROR = "error"


@dataclass(frozen=True)
class RequestRecord:
    """One request as its user saw it. Times are seconds from the start of the run.

    Latencies count from `scheduled_s`, when the request was due, and not from `sent_s`, when this client got round to
    sending it: a client that is held up must not make the server look fast (coordinated omission).
    """

    index: int
    kind: str
    turn: int
    is_warmup: bool
    scheduled_s: _Seconds
    sent_s: _Seconds
    finished_s: _Seconds
    """The last token's arrival; where it failed, the moment of that."""
    outcome: Outcome
    error: str = ""
    first_token_s: _Seconds | None = None
    gaps_s: tuple[_Seconds, ...] = ()
    """Between one chunk with tokens and the next."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def late_s(self) -> float:
        return max(0.0, self.sent_s - self.scheduled_s)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of the tokens after the first; None for an answer of one token."""
        if self.first_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> float | None:
        """The 99th percentile of this answer's own gaps; None for an answer of one chunk."""
        return percentile(sorted(self.gaps_s), 0.99) if self.gaps_s else None

    @property
    def e2e_s(self) -> float:
        return self.finished_s - self.scheduled_s

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"gaps_s": list(self.gaps_s), "outcome": str(self.outcome)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> RequestRecord:
        """Checked: a record from another process is data. Raises ValueError."""
        if set(data) != {each.name for each in fields(cls)}:
            raise ValueError(f"no record of a request: its fields are {sorted(data)}")
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"no record of a request: {error}") from error


def percentile(ordered: Sequence[float], share: float) -> float:
    """Returns a percentile of ascending values, interpolated as numpy does by default."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
