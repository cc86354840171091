"""Says what the scheduler asks of those who guess, whatever they guess from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from services.rates import StepShape

TO_BE_DRAFTED: Final = -1
"""Stands for a token that a model will guess when the step runs."""


class Guesses(Protocol):
    """What is known of one request's guesses; it keeps this as long as it lives, wherever it stands."""

    def came(self, token_ids: Sequence[int], num_tried: int) -> None:
        """A step has brought these, in which so many guesses were tried: those that came true, and one more."""

    def lose_blocks(self) -> None:
        """Its blocks are gone, with all that anybody has computed in them."""


@dataclass(frozen=True)
class Candidate:
    """A sequence of a step that generates."""

    token_ids: Sequence[int]  # of which the step computes the last one
    guesses: Guesses
    max_guesses: int  # that its limits and its blocks allow
    num_said: int = 0  # tokens of its output so far
    num_to_come: int = 1 << 30  # that its limits allow


class DraftChunk(NamedTuple):
    """Tokens from `start` to before `end` that a draft model computes in this step, in the sequence's blocks."""

    row: int  # of the sequence in its batch; in a plan, of the candidate
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """A step's guesses."""

    drafts: Sequence[tuple[int, ...]]  # for each candidate
    chunks: Sequence[DraftChunk] = ()  # one for each that a draft model guesses for, or catches up with


class Speculation(Protocol):
    """Chooses a step's guesses."""

    def new_guesses(self) -> Guesses:
        """Of a request that generates for the first time here."""

    def plan(self, candidates: Sequence[Candidate], max_guesses: int, shape: StepShape) -> Plan:
        """The guesses to try for each candidate, `max_guesses` in all at most; `shape`: the step without them."""
