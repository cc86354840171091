"""Says what a simulated worker is asked, and what it tells: the same of one that takes each step and of one that leaps.

compute ─▶ begun ─▶ first token ─▶ (a token a step) ─▶ ended          a prompt that stays
compute, hold ─▶ begun ─▶ first token ─▶ release                      a prompt for another worker
reserve ─▶ granted ─▶ join ─▶ (a token a step) ─▶ ended               its continuation there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvstore.block import BlockHash
from services.budgets import Budgets
from services.planner.job import Job


class Load(NamedTuple):
    """What a frame says of a worker, as the message of that name."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_waiting_tokens: int = 0
    num_context_tokens: int = 0
    """Over its streams."""


class Listener(Protocol):
    """Hears what a worker does, the moment that it is done."""

    def begun(self, job: Job) -> None:
        """Its first chunk is about to be computed, for another worker."""

    def first(self, row: int, job: Job, num_last_tokens: int) -> None:
        """Its first token is there; the last chunk was so many tokens."""

    def ended(self, job: Job) -> None:
        """Its last token is there."""

    def gaps(self, seconds: float, num_tokens: int) -> None:
        """So many tokens came so long after the one before them."""

    def stepped(self, row: int) -> None:
        """A step has ended: there may be news of the load."""


class Worker(Protocol):
    """One worker."""

    row: int
    """Which one it is: its place in the fleet."""
    busy_s: float
    """In steps so far."""
    num_steps: int

    def peek(self, hashes: Sequence[BlockHash]) -> int:
        """How many of these blocks, from the first on, it has."""

    def compute(self, job: Job, hold: bool = False) -> None:
        """Queue its prompt. `hold`: for another worker, until `release`."""

    def give_up(self, job: Job, then: Callable[[], None]) -> None:
        """Compute no more of its prompt. What was computed stays as a cached prefix; not called if all of it was."""

    def reserve(self, job: Job, granted: Callable[[], None]) -> None:
        """Ask for blocks that its prompt can be read into, and for a place in the batch."""

    def cancel(self, job: Job) -> None:
        """What it reserved, or asked for, is wanted no more."""

    def join(self, job: Job) -> None:
        """Its prompt has been read into what was granted, and its first token is known."""

    def release(self, job: Job) -> None:
        """What was held of it has been read."""

    def bring(self, hashes: Sequence[BlockHash], then: Callable[[], None]) -> None:
        """These blocks have been fetched, if there is room for them."""

    def bend(self, budgets: Budgets) -> None:
        """Keep to these from the next step on."""

    def load(self) -> Load:
        """As it is now."""
