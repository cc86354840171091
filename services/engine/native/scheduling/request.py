"""A request inside one engine: what was asked, where it stands, and what it holds.

Created by a worker's service, driven by the scheduler. `Request.move_to` is the only place that changes the status.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvstore.block import BlockHash
from services.lifecycle import Timeline

MAX_LOGPROBS = 20
# Below this a temperature is greedy; the same bound as vLLM's.
GREEDY_TEMPERATURE = 1e-5

_MAX_SEED = 2**64 - 1
_MAX_LOGIT_BIAS = 100.0
_MAX_PENALTY = 2.0
# Parameters travel, and logits are computed, in float32: its normal range.
_MIN_FACTOR, _MAX_FACTOR = 1e-37, 1e37


class EngineError(Exception):
    """Base of the errors that the engine raises on purpose."""


class InvalidRequest(EngineError, ValueError):
    """The request cannot be served as it stands; `param` is the field at fault as OpenAI's API spells it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class QueueFull(EngineError):
    """As many requests wait as may wait: try another worker, or later."""


class IllegalTransition(EngineError):
    """A request was moved between two statuses that are not connected: a bug of ours."""


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens; field by field `tandem.v1.SamplingParams`. Raises `InvalidRequest`."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0  # 0 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1 is off
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per generated token; 0: the token's own only; None: no logprobs
    prompt_logprobs: int | None = None  # the same for prompt tokens

    def __post_init__(self) -> None:
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, exclude_low=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        _check_float("frequency_penalty", self.frequency_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        _check_float("repetition_penalty", self.repetition_penalty, _MIN_FACTOR, _MAX_FACTOR)
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, 2**32 - 1)
            _check_float("logit_bias", bias, -_MAX_LOGIT_BIAS, _MAX_LOGIT_BIAS)
        for token_id in self.allowed_token_ids:
            _check_int("allowed_token_ids", token_id, 0, 2**32 - 1)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, 2**32 - 1)
        _check_int("seed", self.seed, 0, _MAX_SEED)
        _check_int("max_tokens", self.max_tokens, 1, 2**32 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    def ends(self, eos_token_ids: Iterable[int]) -> set[int]:
        """The tokens that end the output, and that `min_tokens` therefore forbids at first."""
        return {*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)}


def _check_float(name: str, value: float, low: float, high: float, *, exclude_low: bool = False) -> None:
    in_range = low < value <= high if exclude_low else low <= value <= high
    if not in_range or not math.isfinite(value):
        raise InvalidRequest(name, f"must be in {'(' if exclude_low else '['}{low:g}, {high:g}], got {value:g}")


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(name, f"must be in [{low}, {high}], got {value}")


@dataclass(frozen=True)
class TokenLogprob:
    """A token at one position: natural logarithm of its probability, and its rank (1 is the most likely)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class PositionLogprobs:
    """One position: the token that stands there, then the most likely ones in order of rank."""

    chosen: TokenLogprob | None
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class SampledToken:
    """One generated token."""

    token_id: int
    logprobs: PositionLogprobs | None = None


class FinishReason(Enum):
    """Why a request ended in this engine."""

    STOP = "stop"  # end-of-sequence token or a stop token
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"
    ERROR = "error"  # the logits were not finite, or left no token to choose
    HANDED_OFF = "handed_off"  # hold_blocks: the first token is there and it was not the last


class RequestStatus(Enum):
    """Where a request stands. What an abort finds to free is noted per status."""

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
class Request:
    """One request in one engine. The service fills the first group of fields, the scheduler owns the rest."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    priority: int = 0  # smaller is sooner
    cache_salt: str = ""
    arrival_s: float = 0.0  # FIFO within a priority; any clock, the same for all requests of an engine
    hold_blocks: bool = False  # ends after the first token and leaves its block references to the caller
    given_hashes: Sequence[BlockHash] = ()  # of the prompt's full blocks, where somebody has hashed it already
    timeline: Timeline = field(default_factory=lambda: Timeline(time.time))

    status: RequestStatus = RequestStatus.NEW
    history: list[RequestStatus] = field(default_factory=lambda: [RequestStatus.NEW])
    output_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # prompt, then output
    num_computed_tokens: int = 0  # tokens whose KV is in the block table
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache held when the request was first scheduled
    num_preemptions: int = 0
    num_published_blocks: int = 0  # blocks of the table that were offered to the prefix cache
    may_publish: bool = True  # False once a given hash was found to be wrong
    was_scheduled: bool = False  # has been in a step
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks of token_ids
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)  # None at position 0, so far computed
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop_token_ids member that ended it

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.prompt_token_ids)
        self.token_ids = [*self.prompt_token_ids, *self.output_token_ids]
        self.block_hashes = list(self.given_hashes)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

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
        """Why the newest output token is the last one; None if it is not. Notes the stop token, if one ended it."""
        token_id, num_outputs = self.output_token_ids[-1], len(self.output_token_ids)
        if num_outputs >= self.sampling.min_tokens:
            if token_id in eos_token_ids and not self.sampling.ignore_eos:
                return FinishReason.STOP
            if token_id in self.sampling.stop_token_ids:
                self.stop_token_id = token_id
                return FinishReason.STOP
        if num_outputs >= self.sampling.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        # The first token is all that was wanted here; who continues holds the blocks.
        return FinishReason.HANDED_OFF if self.hold_blocks else None

    def append_output(self, token_id: int) -> None:
        """Add a generated token, whose KV is not computed yet."""
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)


@dataclass(frozen=True)
class RequestUpdate:
    """What one step did for one request."""

    request: Request
    first_scheduled: bool  # this was the request's first step
    num_computed_tokens: int  # after the step
    new_tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None  # with the first token; None at position 0
    failure: str | None = None  # with FinishReason.ERROR: why there is no token
