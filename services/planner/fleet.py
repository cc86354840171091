"""Describes a fleet that is simulated: which workers, what they can hold, how fast, and how far apart."""

from __future__ import annotations

from dataclasses import dataclass

from services.budgets import Objectives
from services.rates import Rates


@dataclass(frozen=True)
class Shape:
    """How many workers of which kind. Without prefill workers, all of them compute their own prompts."""

    num_prefill: int
    num_decode: int
    is_elastic: bool = False
    """All of them do both; the first number has the role of a prefill worker to begin with."""

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode

    @property
    def num_only_prefill(self) -> int:
        """Those that do nothing else."""
        return 0 if self.is_elastic else self.num_prefill

    @property
    def kind(self) -> str:
        """What it is called in a table."""
        if self.is_elastic:
            return "elastic"
        return "prefill and decode" if self.num_prefill else "colocated"

    def larger(self) -> Shape:
        """With one worker more, where it changes the proportions least."""
        more = int(0 < self.num_prefill < self.num_decode)
        return Shape(self.num_prefill + more, self.num_decode + 1 - more, self.is_elastic)

    def __str__(self) -> str:
        if self.is_elastic:
            return f"{self.num_workers} elastic"
        if not self.num_prefill:
            return f"{self.num_decode} colocated"
        return f"{self.num_prefill}P:{self.num_decode}D"


@dataclass(frozen=True)
class Limits:
    """What one worker holds. The defaults are those of a worker on a CPU."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    num_blocks: int = 4096
    block_size: int = 32
    max_model_len: int = 1 << 20
    local_prefill_max_tokens: int = 16


@dataclass(frozen=True)
class Delays:
    """Seconds between processes of one machine or rack, where nobody waits for anybody. Stated, not computed."""

    order_s: float = 0.002
    """From the router to a decode worker, and from there to a prefill worker."""
    frame_s: float = 0.001
    """From a step's end until the router has its tokens, and the worker's load."""
    handoff_s: float = 0.005
    """Of a handoff, beside reading the blocks of the last chunk: offers, proofs, the join."""


@dataclass(frozen=True)
class Setup:
    """All that a simulation goes by beside the requests and the fleet's shape."""

    rates: Rates
    objectives: Objectives
    limits: Limits = Limits()
    delays: Delays = Delays()
    worker_backlog_s: float = 0.5
    """As a router's setting of that name."""
    max_queue: int = 1024
    max_concurrent_requests: int = 1024
    """As a router's. For a larger fleet than one router's, as many of both as the fleet has places."""
