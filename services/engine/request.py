"""Defines what is asked of an engine and what its steps bring: the words of `services.engine.api`."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHash
from kvstore.protocol import AnnouncedBlock
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
    """The queue is full: try another worker, or later."""


@dataclass(frozen=True)
class SamplingParams:
    """Says how logits become tokens; field by field `tandem.v1.SamplingParams`. Raises `InvalidRequest`."""

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
        # Of these there may be as many as the vocabulary has.
        _check_token_ids("logit_bias", self.logit_bias)
        if not (np.abs(self.biases) <= _MAX_LOGIT_BIAS).all():
            for bias in self.logit_bias.values():
                _check_float("logit_bias", bias, -_MAX_LOGIT_BIAS, _MAX_LOGIT_BIAS)
        _check_token_ids("allowed_token_ids", self.allowed_token_ids)
        _check_token_ids("stop_token_ids", self.stop_token_ids)
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

    # As the sampler wants them at every step.

    @functools.cached_property
    def allowed_index(self) -> npt.NDArray[np.int64]:
        """`allowed_token_ids`."""
        return np.array(self.allowed_token_ids, np.int64)

    @functools.cached_property
    def biased_index(self) -> npt.NDArray[np.int64]:
        """The tokens of `logit_bias`."""
        return np.fromiter(self.logit_bias.keys(), np.int64, len(self.logit_bias))

    @functools.cached_property
    def biases(self) -> npt.NDArray[np.float32]:
        """Those of `biased_index`, in its order."""
        return np.fromiter(self.logit_bias.values(), np.float32, len(self.logit_bias))

    @functools.cached_property
    def stop_index(self) -> npt.NDArray[np.int64]:
        """`stop_token_ids`."""
        return np.array(self.stop_token_ids, np.int64)

    @functools.cached_property
    def stop_set(self) -> frozenset[int]:
        """`stop_token_ids`."""
        return frozenset(self.stop_token_ids)

    def with_lists_of(self, other: SamplingParams) -> SamplingParams:
        """The same with another's lists of tokens: both hold them, and what the sampler makes of them, only once."""
        shared = copy.copy(self)
        shared.__dict__.update((name, getattr(other, name)) for name in (*_LISTS, *_MADE_OF_LISTS))
        return shared

    def ends(self, eos_token_ids: Iterable[int]) -> set[int]:
        """The tokens that end the output, and that `min_tokens` therefore forbids at first."""
        return {*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)}


_LISTS = ("logit_bias", "allowed_token_ids", "stop_token_ids")
_MADE_OF_LISTS = ("biased_index", "biases", "allowed_index", "stop_index", "stop_set")


def _check_float(name: str, value: float, low: float, high: float, *, exclude_low: bool = False) -> None:
    in_range = low < value <= high if exclude_low else low <= value <= high
    if not in_range or not math.isfinite(value):
        raise InvalidRequest(name, f"must be in {'(' if exclude_low else '['}{low:g}, {high:g}], got {value:g}")


def _check_token_ids(name: str, token_ids: Collection[int]) -> None:
    if token_ids:
        _check_int(name, min(token_ids), 0, 2**32 - 1)
        _check_int(name, max(token_ids), 0, 2**32 - 1)


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


Mask: TypeAlias = Callable[[Sequence[int]], Collection[int] | None]
"""Says of the output so far, resumed tokens included, which tokens may follow; None: all."""


class FinishReason(Enum):
    """The reasons why a request ends in this engine."""

    STOP = "stop"  # end-of-sequence token or a stop token
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"
    ERROR = "error"  # the logits were not finite, or left no token to choose
    HANDED_OFF = "handed_off"  # hold_blocks: the first token is there and it was not the last
    MOVED = "moved"  # suspended, to go on elsewhere


@dataclass(eq=False)
class Request:
    """An order to an engine. Nobody changes it but by marking events; what comes of it is in the updates.

    A request may be resumed: what another engine put out already comes with it, and the next token is the one that
    would have followed there. Its *context* is prompt and these; positions, limits and penalties count them as output.
    """

    request_id: str  # of one request at a time
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    priority: int = 0  # smaller is sooner
    cache_salt: str = ""
    adapter: str = ""  # the key of the LoRA adapter to compute it with, one of `Capabilities.adapters`; "": none
    mask: Mask | None = None
    arrival_s: float = 0.0  # FIFO within a priority; any clock, the same for all requests of an engine
    hold_blocks: bool = False  # ends after its first token here; its updates lend the caller the context's blocks
    transfer_id: bytes = b""  # with hold_blocks: that its blocks are lent in, which their proofs need
    given_hashes: Sequence[BlockHash] = ()  # of the context's full blocks, where somebody has hashed it already
    resumed_token_ids: Sequence[int] = ()  # the output so far, where another engine began it
    tpot_s: float = math.inf  # seconds per output token that its client is to get at most; infinite: whatever comes
    timeline: Timeline = field(default_factory=lambda: Timeline(time.time))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_context_tokens(self) -> int:
        """Tokens that must be computed, or be there, before the first one is sampled here: prompt and resumed ones."""
        return len(self.prompt_token_ids) + len(self.resumed_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs were asked for, and have not been told by who began the output."""
        return self.sampling.prompt_logprobs is not None and not self.resumed_token_ids


@dataclass(frozen=True)
class Suspended:
    """A request that was taken out to go on elsewhere, from the blocks that it leaves with the caller.

    They hold the KV of prompt and output but for the newest token's, which no step has computed yet: full ones, and a
    partial last one, without a hash. None where nothing was computed, or it was not kept.
    """

    num_output_tokens: int  # resumed ones included
    blocks: tuple[AnnouncedBlock, ...] = ()


@dataclass(frozen=True)
class RequestUpdate:
    """The result of one step for one request."""

    request: Request
    num_computed_tokens: int  # after the step
    new_tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop_token_ids member that ended it
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None  # with the first token; None at position 0
    failure: str | None = None  # with FinishReason.ERROR: why there is no token
    num_output_tokens: int = 0  # so far, resumed ones included
    num_cached_tokens: int = 0  # context tokens that the prefix cache held when the request was first scheduled
    num_preemptions: int = 0
    # With hold_blocks: the context's blocks that this step completed, each lent to the caller
    # (`Engine.release_blocks`).
    # The first is number `first_block`; the last come with the first token, the partial one, without a hash, too.
    first_block: int = 0
    blocks: tuple[AnnouncedBlock, ...] = ()
