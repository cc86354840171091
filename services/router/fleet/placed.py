"""Describes a sequence that is to be placed, and where it is once it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash
from services.budgets import Objectives
from services.router.fleet.prefixes import BlockSpace, PromptBlocks
from services.router.routing import NO_OBJECTIVES, Decision, WorkerKey


@dataclass(frozen=True)
class Ask:
    """A sequence to be placed. `blocks` are those of its prompt, and of the output that its order resumes."""

    tenant: str
    request_id: str
    """Of the HTTP request, which may have several sequences."""
    index: int
    order: pb.GenerateRequest
    """Without the prompt."""
    prompt: Sequence[int]
    """Which the request's other sequences share."""
    lists: pb.SamplingParams | None
    """The lists of tokens that its order lacks, and the request's other sequences have, too; None: it lacks none."""
    fingerprints: Collection[str]
    """Of the model's weights: of workers with others, which a rollout gave the same name, none may get it."""
    blocks: PromptBlocks
    key: bytes
    objectives: Objectives = NO_OBJECTIVES
    """What its client is to get, counted from its arrival."""
    arrived_s: float = 0.0
    """By the router's clock."""

    def objectives_left(self, now_s: float) -> Objectives:
        """What is left of its objectives: it has waited for a while, and what has begun waits for no first token."""
        if self.order.resumed_token_ids:
            return Objectives(tpot_s=self.objectives.tpot_s)
        if self.objectives.ttft_s == math.inf:
            return self.objectives
        return Objectives(max(self.objectives.ttft_s - (now_s - self.arrived_s), 0.0), self.objectives.tpot_s)

    @property
    def num_final_tokens(self) -> int:
        """Of prompt and output, at most."""
        return len(self.prompt) + self.order.sampling.max_tokens


@dataclass
class Placement:
    """A sequence at its workers: who serves it, and what is counted on its account until its prefill has ended."""

    ask: Ask
    decision: Decision
    space: BlockSpace
    num_counted_tokens: int = 0
    num_redirects: int = 0
    sent_s: float = 0.0
    """When its prompt was last sent to who computes it."""
    redirect: Callable[[pb.RedirectRequest], bool] = lambda message: False
    """Tells its decode worker; False where that cannot be."""

    @property
    def blocks(self) -> PromptBlocks:
        return self.ask.blocks

    @property
    def decode_key(self) -> WorkerKey:
        return self.decision.decode.worker_id, self.decision.decode.incarnation

    @property
    def prefill_key(self) -> WorkerKey:
        """Returns the key of the worker that is expected to prefill."""
        if self.decision.prefills_locally:
            return self.decode_key
        return self.decision.prefill[0].worker_id, self.decision.prefill[0].incarnation

    @property
    def hashes(self) -> Sequence[BlockHash]:
        return self.blocks.hashes.get(self.space, ())
