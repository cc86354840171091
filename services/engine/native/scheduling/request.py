"""Defines a request inside this engine: its order, its status, and its holdings.

Made of what a worker asks, driven by the scheduler. `Request.move_to` is the only place that changes the status.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kvstore.block import BlockHash
from services.engine import request as asked
from services.engine.limits import end_of
from services.engine.native.speculation import Guesses
from services.engine.request import EngineError, FinishReason, PositionLogprobs


class IllegalTransition(EngineError):
    """A request was moved between two statuses that are not connected: a bug of ours."""


class RequestStatus(Enum):
    """The states of a request. What an abort finds to free is noted per status."""

    NEW = "new"  # the engine does not know it; holds nothing
    WAITING = "waiting"  # in the queue; holds nothing
    RUNNING = "running"  # takes part in steps; holds its block table
    PREEMPTED = "preempted"  # in the queue again; holds nothing
    RESERVING = "reserving"  # waits for blocks to read a prompt into; holds nothing
    RESERVED = "reserved"  # has a place in the batch; the blocks belong to the caller who reads into them
    FINISHED = "finished"  # holds nothing; with hold_blocks the block table is the caller's to release


_TRANSITIONS: Mapping[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.NEW: frozenset({RequestStatus.WAITING, RequestStatus.RESERVING}),
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.PREEMPTED, RequestStatus.FINISHED}),
    RequestStatus.PREEMPTED: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
    # Back to NEW: the transfer failed, and the caller tries another worker or prefills locally.
    RequestStatus.RESERVING: frozenset({RequestStatus.RESERVED, RequestStatus.NEW, RequestStatus.FINISHED}),
    RequestStatus.RESERVED: frozenset({RequestStatus.RUNNING, RequestStatus.NEW, RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


@dataclass(eq=False)
class Request(asked.Request):
    """A request: what was asked, its status, and what it holds."""

    status: RequestStatus = RequestStatus.NEW
    history: list[RequestStatus] = field(default_factory=lambda: [RequestStatus.NEW])
    output_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # prompt, then output
    num_computed_tokens: int = 0  # tokens whose KV is in the block table
    num_cached_tokens: int = 0  # context tokens that the prefix cache held when the request was first scheduled
    num_preemptions: int = 0
    num_lent_blocks: int = 0  # with hold_blocks: of the context's, those that updates have lent; preempted or not
    num_published_blocks: int = 0  # blocks of the table that were offered to the prefix cache
    may_publish: bool = True  # False once a given hash was found to be wrong
    was_scheduled: bool = False  # has been in a step
    guesses: Guesses | None = None  # of the tokens to come; made when first wanted
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks of token_ids
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)  # None at position 0, so far computed
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop_token_ids member that ended it

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.prompt_token_ids)
        self.output_token_ids = [*self.resumed_token_ids, *self.output_token_ids]
        self.token_ids = [*self.prompt_token_ids, *self.output_token_ids]
        self.block_hashes = list(self.given_hashes)

    @classmethod
    def of(cls, asked_for: asked.Request) -> Request:
        """The scheduler's own of a request that has just come."""
        return asked_for if isinstance(asked_for, cls) else cls(**vars(asked_for))

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs were asked for and have not been reported (they are, with the first token)."""
        return self.sampling.prompt_logprobs is not None and not self.output_token_ids

    def move_to(self, status: RequestStatus) -> None:
        """Change the status; raises `IllegalTransition`, with the history, where the table has no such step."""
        if status not in _TRANSITIONS[self.status]:
            path = " -> ".join(past.name for past in self.history)
            raise IllegalTransition(f"request {self.request_id}: {path} -> {status.name} is not a legal transition")
        self.status = status
        self.history.append(status)
        # A request is preempted any number of times; the last few steps are what a report needs.
        del self.history[:-32]

    def stop_reason(self, eos_token_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
        """Returns why the newest output token is the last, or None. Notes the stop token, if one ended it."""
        outputs = self.output_token_ids
        reason, self.stop_token_id = end_of(self, outputs[-1], len(outputs), eos_token_ids, max_model_len)
        return reason

    def append_output(self, token_id: int) -> None:
        """Add a generated token, whose KV is not computed yet."""
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)
