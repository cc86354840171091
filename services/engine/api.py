"""The engine port: all that a worker knows of what computes its tokens.

An engine belongs to one thread, which calls it between steps; "any thread" stands where that is not so. Whoever is
given block ids, by a granted reservation, by updates of a `hold_blocks` request, by `suspend`, by `lend_prefix` or
`take_prefix`,
holds one reference on each and gives it back by `release_blocks`; `check_integrity` counts them. tests/engine_contract
says what every engine does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.block import BlockHash, BlockLayout, BlockMemory, Proof, ProofKey, Subject
from kvstore.pool import CacheChange, CopiedBack
from kvstore.protocol import Reservation
from services.budgets import Budgets
from services.engine.request import (
    EngineError,
    FinishReason,
    InvalidRequest,
    PositionLogprobs,
    QueueFull,
    Request,
    RequestUpdate,
    SampledToken,
    SamplingParams,
    Suspended,
    TokenLogprob,
)
from services.rates import NO_STEP, RateLearner, StepShape

__all__ = [
    "BudgetsFixed",
    "Capabilities",
    "Engine",
    "EngineError",
    "EngineLoad",
    "EngineStats",
    "FinishReason",
    "InvalidRequest",
    "NotLent",
    "NotReserved",
    "PositionLogprobs",
    "QueueFull",
    "Request",
    "RequestUpdate",
    "Restore",
    "SampledToken",
    "SamplingParams",
    "StepOutput",
    "Suspended",
    "TokenLogprob",
]


class NotReserved(EngineError):
    """A request was to join the running ones that has no place among them: it was aborted, or never granted one."""


class NotLent(EngineError):
    """The caller gave back, or wants to use, a block that it does not hold: a bug of the caller."""


class BudgetsFixed(EngineError):
    """This engine cannot keep to such budgets: `names` has what it cannot change while it runs."""

    def __init__(self, names: Sequence[str], why: str) -> None:
        super().__init__(f"{' and '.join(names)} cannot be changed: {why}")
        self.names = tuple(names)


@dataclass(frozen=True)
class Capabilities:
    """The properties of an engine that last as long as it lives."""

    max_model_len: int  # prompt and output tokens of one request
    max_num_seqs: int  # requests in one step
    num_blocks: int  # in `memory`
    num_host_blocks: int  # that it keeps beside, and brings back by `begin_restore`; 0: none
    caches_prefixes: bool
    kv_cache_dtype: str  # of keys and values, as people call it; what the bytes are says the layout
    is_exact: bool  # no bit of a logit depends on what else is computed, nor on how a sequence is cut into steps
    compute: Mapping[str, str]  # what computes the model, as labels: device, kernels, quantization
    is_simulation: bool = False  # its tokens mean nothing; whoever shows them says so
    samples_first_token: bool = False  # of a context that comes from elsewhere, too: see `Engine.add_prefilled`
    adapters: tuple[str, ...] = ()  # keys of those that a request may name (services.engine.adapters)
    numerics: str = ""  # names the arithmetic: exact engines of one name have a model's logits to the bit; "": unknown


@dataclass(frozen=True)
class EngineLoad:
    """The load of an engine, for routing and for people."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_waiting_tokens: int  # prompt tokens not yet computed here
    num_cached_blocks: int
    num_lent_blocks: int
    num_context_tokens: int  # over the running streams, of prompt and output


@dataclass
class EngineStats:
    """Counts since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens (and resumed ones) looked up in the prefix cache
    num_prefix_hits: int = 0  # of these, found
    num_partial_hit_tokens: int = 0  # of those found, the ones copied from a block that goes on with other tokens
    num_prompt_tokens: int = 0  # computed, recomputation included
    num_generated_tokens: int = 0  # sampled here, so without a first token that came with its prompt
    num_drafts: int = 0  # steps of a request that tried guessed tokens
    num_draft_tokens: int = 0  # guessed
    num_accepted_tokens: int = 0  # of these, the ones that came true
    num_corrupt_blocks: int = 0  # cached ones whose bytes had changed
    num_finished: Counter[FinishReason] = field(default_factory=Counter)


@dataclass(frozen=True)
class StepOutput:
    """The results of one step: one update per request that took part and was not aborted meanwhile."""

    updates: tuple[RequestUpdate, ...] = ()
    num_tokens: int = 0  # computed; 0: nothing could run before a command frees memory or brings work
    shape: StepShape = NO_STEP
    duration_s: float = 0.0  # from scheduling to booking, by the engine's clock


class Restore(Protocol):
    """A prefix on its way back from the engine's own tier; holds blocks until `end`, which whoever gets one calls."""

    def copy_back(self) -> None:
        """Fill and verify the blocks. On any one thread."""

    def end(self) -> CopiedBack:
        """Publish what came back whole, and give the rest back: all, where nothing was copied or copying failed."""


class Engine(Protocol):
    """One worker's compute: queues, block memory, prefix cache and model."""

    @property
    def layout(self) -> BlockLayout:
        """Returns the layout of its blocks. Any thread, as the next four."""

    @property
    def memory(self) -> BlockMemory:
        """The paged blocks' bytes, for transports to read and to write."""

    @property
    def proof_key(self) -> ProofKey:
        """What proves the blocks that it computes, and those that it is given."""

    @property
    def capabilities(self) -> Capabilities:
        """Constants."""

    @property
    def rates(self) -> RateLearner:
        """How fast it is. It learns from its steps, warm-up included; its worker has it learn from fetches."""

    # ---- requests ---------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` if the request can never run here. Any thread."""

    def add_request(self, request: Request) -> None:
        """Queue a request to be computed here. Raises `InvalidRequest` or `QueueFull`."""

    def reserve(self, request: Request, callback: Callable[[Reservation], None]) -> None:
        """Ask for blocks to read the request's context into, one for each that it fills or begins.

        `callback` is called once, here or within a later call, on this thread; never after `cancel_reservation` or
        `abort`. The blocks are then the caller's: they go to `add_prefilled`, or back through `release_reservation`.
        Raises `InvalidRequest`.
        """

    def cancel_reservation(self, request: Request) -> bool:
        """Stop waiting for blocks. False if they were granted already, or were never asked for."""

    def release_reservation(self, request: Request, block_ids: Sequence[int]) -> None:
        """Give back what a granted reservation holds, when no late byte can arrive any more. Raises `NotLent`."""

    def add_prefilled(
        self, request: Request, block_ids: Sequence[int], proofs: Sequence[Proof], first_token: SampledToken | None
    ) -> RequestUpdate:
        """Join a request whose context another worker computed to the running batch.

        `block_ids` are those of its granted reservation; they hold the KV of the whole context, verified by `proofs`,
        and become the request's. The update carries the first token, which later steps do not repeat, and says whether
        it was the last. None, where `samples_first_token`: the next step computes the last token of the context again
        and samples the first one. Raises `NotReserved` (say, aborted), `NotLent` or `InvalidRequest`, changing nothing.
        """

    def abort(self, request_id: str) -> bool:
        """End a live request wherever it is and free what it holds; False if there is none of that id.

        Blocks of a granted reservation stay the caller's, who releases them when its transfer has ended.
        """

    def suspend(self, request_id: str, transfer_id: bytes) -> Suspended | None:
        """End a live request so that it goes on elsewhere, and lend its blocks to the caller, who will lend them on in
        that transfer.

        None, changing nothing, while its prompt is being computed or read, and where there is none of that id.
        """

    # ---- blocks and the prefix cache ----------------------------------------------

    def peek_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Counts how many of the first `hashes` are cached. A hint, from any thread; takes no reference."""

    def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Lend the longest cached prefix of `hashes`, for a reader."""

    def take_prefix(self, hashes: Sequence[BlockHash]) -> Reservation | None:
        """Blocks to bring a prefix into that another worker or a store holds, or None if there is no room now.

        The first `num_present` are cached here. All are lent: `publish_blocks` makes those findable that were filled
        and verified, `release_blocks` gives them back, findable or not.
        """

    def publish_blocks(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        proofs: Sequence[Proof],
        parent_hash: BlockHash | None = None,
    ) -> None:
        """Make lent blocks, verified by `proofs`, findable in the prefix cache: the run of a chain that follows
        `parent_hash`, or its head. Raises `NotLent`.
        """

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """Give back references that the caller holds. Raises `NotLent`, changing nothing, if it holds no such one."""

    def proofs(self, block_ids: Sequence[int], subjects: Sequence[Subject]) -> list[Proof]:
        """The proofs, each for its subject, of blocks that the caller holds."""

    def recheck(self, hashes: Sequence[BlockHash]) -> int:
        """Hold cached blocks against their proofs and drop those that have changed; returns how many."""

    def cached_hashes(self) -> list[BlockHash]:
        """All findable blocks. Any thread."""

    def take_cache_changes(self) -> list[CacheChange]:
        """Returns the changes of findable blocks since the last call, in order."""

    # ---- the engine's own tier; without one it is empty and changes nothing -------

    def may_restore(self, block_hash: BlockHash) -> bool:
        """Whether the tier has the block. A hint, from any thread."""

    def begin_restore(self, hashes: Sequence[BlockHash]) -> Restore | None:
        """Begin to bring back from the tier what follows the cached prefix of `hashes`; None: nothing, or no room."""

    def host_hashes(self) -> list[BlockHash]:
        """All findable blocks of the tier. Any thread."""

    def take_host_changes(self) -> list[CacheChange]:
        """Returns the changes of the tier's findable blocks since the last call, in order."""

    def host_figures(self) -> Mapping[str, float]:
        """The tier's sizes and counts by name, empty without one. Any thread."""

    # ---- budgets ----------------------------------------------------------------------

    def set_budgets(self, budgets: Budgets) -> None:
        """Have later steps keep to these; UNBOUND at first. Between steps, whatever runs or waits.

        A step with streams, which go on from a token, carries of prompts what fits beside these; a stream's own
        `Request.tpot_s` counts where it is the smaller one. Prompts that eight steps in a row left out get MIN_CHUNK
        in the next one all the same. Raises `BudgetsFixed`, changing nothing.
        """

    @property
    def budgets(self) -> Budgets:
        """Those that steps keep to. Any thread."""

    # ---- steps and state ------------------------------------------------------------

    def warm_up(self) -> Sequence[StepOutput]:
        """Prepare, before any request, what would be prepared in the first steps, and leave nothing findable behind.

        Returns shapes and durations of steps as they are from then on.
        """

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something. False while all that waits waits for memory that others hold."""

    def when_lost(self, tell: Callable[[], None]) -> None:
        """Have `tell` called, from any thread, when a process that computes for it is gone: the next step raises."""

    @property
    def step_shape(self) -> StepShape:
        """The work of the step that is being computed, NO_STEP between two. Any thread."""

    def step(self, on_begun: Callable[[Request], None] = ...) -> StepOutput:
        """Choose work, compute it and book it. An exception leaves the engine unusable. `on_begun` hears of each
        request that takes part for the first time, before anything is computed.
        """

    @property
    def stats(self) -> EngineStats:
        """Counts. Any thread."""

    def load(self) -> EngineLoad:
        """Returns the present load. Any thread, which gets a fair estimate."""

    def check_integrity(self) -> None:
        """Raise unless each block's references are those that requests and callers hold."""
