"""Follows one request through a simulated fleet, and keeps the moments that its client would see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.block import BlockHash
from services.planner.workload import PlannedRequest


@dataclass(eq=False, slots=True)
class Job:
    """A request that is under way."""

    number: int
    request: PlannedRequest
    token_ids: Sequence[int] = ()
    """Of its prompt; empty where only lengths count."""
    hashes: Sequence[BlockHash] = ()
    """Of the prompt's full blocks."""
    decode_row: int = -1
    prefill_row: int = -1
    """Of the worker that is expected to prefill; -1: it is the decode worker."""
    sources: Sequence[int] = ()
    """Rows of workers, of either kind, that have some of its prefix, the best first."""
    counted_row: int = -1
    """Of the worker at which the router counts its prompt as in front of others..."""
    num_counted_tokens: int = 0
    """... and so many tokens of it."""
    at_row: int = -1
    """Of the worker that has its prompt; -1: it is on its way to one."""
    course: int = 0
    """Counts its redirections: what was on its way of an earlier one does nothing."""
    num_own_tokens: int = 0
    """Computed for it where it was before: they count as no cached ones."""
    first_s: float = -1.0
    """When its client has the first token."""
    end_s: float = -1.0
    num_cached_tokens: int = 0
    num_said: int = 0
    last_s: float = -1.0
    """When its newest token was computed."""
    ended: Callable[[], None] = field(default=lambda: None)
    """Gives its room in the router back."""


class Outcome(NamedTuple):
    """What became of a request. Times are seconds of the simulation; negative: it was refused."""

    at_s: float
    first_s: float
    end_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.at_s

    @property
    def tpot_s(self) -> float:
        """Per token behind the first; 0 where there is none."""
        return (self.end_s - self.first_s) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else 0.0
