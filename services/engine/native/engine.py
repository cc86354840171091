"""One worker's compute: a step is schedule, run, postprocess. No network, and one thread only.

Every command (`add_request`, `reserve`, `abort` ...) comes between steps. Whoever receives block ids from here, by a
granted reservation, by `hold_blocks` or by `lend_blocks`, holds one reference on each and gives it back by
`release_blocks`; `check_integrity` counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvstore.block import BlockHash, BlockLayout, BlockMemory, Proof, find_wrong, prove
from kvstore.pool import BlockPool, CacheChange, CopiedBack
from kvstore.protocol import Reservation
from services.engine.config import EngineConfig
from services.engine.native.memory import (
    Restore,
    begin_restore,
    block_memory,
    bring_back,
    choose_num_blocks,
    choose_num_host_slots,
    end_restore,
    open_host_tier,
)
from services.engine.native.model import LoadedModel, load_model
from services.engine.native.runner import ModelRunner
from services.engine.native.scheduling import (
    Batch,
    InvalidRequest,
    Request,
    RequestUpdate,
    SampledBatch,
    SampledToken,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
    SchedulerStats,
    check_fits,
)
from services.lifecycle import Event
from services.rates import NO_STEP, StepShape

# As `vllm serve` spells them.
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is, for routing and for people."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_waiting_tokens: int  # prompt tokens not yet computed here
    num_cached_blocks: int
    num_lent_blocks: int

    def as_dict(self) -> dict[str, int]:
        """The fields by name, for `/debug/state`."""
        return asdict(self)


@dataclass(frozen=True)
class StepOutput:
    """What one step brought: one update per request that took part and was not aborted meanwhile."""

    updates: tuple[RequestUpdate, ...] = ()
    preempted: tuple[Request, ...] = ()
    num_tokens: int = 0  # computed
    shape: StepShape = NO_STEP
    duration_s: float = 0.0  # from schedule to the end of postprocess, by the engine's clock


class Engine:
    """Scheduler, block pool, KV cache and model of one worker."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        num_blocks: int,
        clock: Callable[[], float] = time.time,
        num_host_slots: int = 0,
    ) -> None:
        """`num_host_slots`: blocks in the host tier; 0: there is none."""
        self.model = model
        self.config = config
        self.max_model_len = model.max_model_len
        self.layout: BlockLayout = model.block_layout(config.block_size)
        self.kv_cache: Tensor = model.new_kv_cache(num_blocks, config.block_size)
        self.memory: BlockMemory = block_memory(self.kv_cache)
        self.host_tier = open_host_tier(self.kv_cache, self.memory, num_host_slots) if num_host_slots else None
        take_evicted = self.host_tier.take_evicted if self.host_tier is not None else None
        self.pool = BlockPool(num_blocks, config.enable_prefix_caching, take_evicted)
        self._runner = ModelRunner(model, self.kv_cache, config.block_size)
        self._scheduler = Scheduler(scheduler_config(config, model), self.pool)
        self._on_grant: dict[str, Callable[[Reservation], None]] = {}  # by id of a reserving request
        self._clock = clock
        self._step_started_s = 0.0

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Engine:
        """Load the model and take the memory. Raises `ModelError` or `SettingsError`."""
        model = load_model(
            config.model,
            dtype=_DTYPE_ALIASES.get(config.dtype, config.dtype),
            device=_choose_device(config.device),
            revision=config.revision or None,
            num_threads=config.num_threads or None,
            max_model_len=config.max_model_len or None,
            quantization=config.quantization,
            cpu_kernels=config.cpu_kernels,
            progress=progress,
        )
        block_bytes = model.block_layout(config.block_size).block_bytes
        num_blocks = choose_num_blocks(config, block_bytes, model.max_model_len, model.device)
        num_host_slots = choose_num_host_slots(config, block_bytes, num_blocks, model.device)
        return cls(model, config, num_blocks, clock, num_host_slots)

    # ---- commands, between steps ----------------------------------------------

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` if the request can never run here. On any thread: it reads constants only."""
        vocab_size = self.model.config.vocab_size
        _check_token_ids("prompt", request.prompt_token_ids, vocab_size)
        sampling = request.sampling
        _check_token_ids("logit_bias", tuple(sampling.logit_bias), vocab_size)
        _check_token_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
        _check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
        _check_allows_any(sampling, self.model.eos_token_ids, vocab_size)
        check_fits(request, self._scheduler.config, self.pool.num_blocks)

    def add_request(self, request: Request) -> None:
        """Queue a request to be computed here. Raises `InvalidRequest` or `QueueFull`."""
        self.check(request)
        self._scheduler.add(request)
        request.timeline.mark(Event.PREFILL_QUEUED)

    def reserve(self, request: Request, callback: Callable[[Reservation], None]) -> None:
        """Ask for blocks to read the request's prompt into, one for each that the prompt fills or begins.

        `callback` is called once, here or within a later call, on this thread; never after `cancel_reservation` or
        `abort`. The blocks are then the caller's: they go to `add_prefilled`, or back through `release_reservation`.
        Raises `InvalidRequest`.
        """
        self.check(request)
        self._scheduler.reserve(request)
        self._on_grant[request.request_id] = callback
        self._grant_reservations()

    def cancel_reservation(self, request: Request) -> bool:
        """Stop waiting for blocks. False if they were granted already, or were never asked for."""
        cancelled = self._scheduler.cancel_reservation(request)
        if cancelled:
            del self._on_grant[request.request_id]
            self._grant_reservations()
        return cancelled

    def release_reservation(self, request: Request, block_ids: Sequence[int]) -> None:
        """Give back what a granted reservation holds, when no late byte can arrive any more. Raises `NotLent`."""
        self._scheduler.release_reservation(request, block_ids)
        self._grant_reservations()

    def add_prefilled(
        self, request: Request, block_ids: Sequence[int], proofs: Sequence[Proof], first_token: SampledToken
    ) -> RequestUpdate:
        """Join a request whose prompt another worker computed to the running batch.

        `block_ids` are those of its granted reservation; they hold the KV of the whole prompt, verified by `proofs`,
        and become the request's. The update carries the first token, which later steps do not repeat, and says whether
        it was the last. Raises `NotReserved` (aborted meanwhile, for one), `NotLent` or `InvalidRequest`, changing
        nothing.
        """
        if not 0 <= first_token.token_id < self.model.config.vocab_size:
            raise InvalidRequest("prompt", f"first token {first_token.token_id} is not in the vocabulary")
        update = self._scheduler.add_prefilled(request, block_ids, proofs, first_token)
        request.timeline.mark(Event.DECODE_JOINED)
        self._grant_reservations()
        return update

    def abort(self, request_id: str) -> bool:
        """End a live request wherever it is and free what it holds; False if there is none of that id.

        Blocks of a granted reservation stay the caller's, who releases them when its transfer has ended.
        """
        aborted = self._scheduler.abort(request_id)
        self._on_grant.pop(request_id, None)
        self._grant_reservations()
        return aborted

    def lend_blocks(self, block_ids: Sequence[int]) -> None:
        """Take one more reference on each block for the caller, so that they outlive their request."""
        self._scheduler.loans.lend(block_ids)

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """Give back references that `hold_blocks`, `lend_blocks` or a reservation left to the caller.

        Raises `NotLent`, changing nothing, if the caller holds no such reference.
        """
        self._scheduler.release_lent(block_ids)
        self._grant_reservations()

    def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Lend the longest cached prefix of `hashes`, for a reader; the caller gives it back by `release_blocks`."""
        return self._scheduler.lend_prefix(hashes)

    def take_prefix(self, hashes: Sequence[BlockHash]) -> Reservation | None:
        """Blocks to bring a prefix into that another worker or a store holds, or None if there is no room now.

        The first `num_present` are cached here. All are lent: `publish_blocks` makes those findable that were filled
        and verified, `release_blocks` gives them back, findable or not.
        """
        return self._scheduler.take_prefix(hashes)

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
        self._scheduler.publish_lent(block_ids, hashes, proofs, parent_hash)

    def proofs(self, block_ids: Sequence[int]) -> list[Proof]:
        """The proofs of blocks that the caller lends; computed here for those that were just made and are not findable
        (a prompt's partial block), and never for a cached one.
        """
        known = self.pool.proofs(block_ids)
        fresh = [block_id for block_id, proof in zip(block_ids, known, strict=True) if proof is None]
        made = dict(zip(fresh, prove(self.memory, fresh), strict=True))
        return [made[block_id] if proof is None else proof for block_id, proof in zip(block_ids, known, strict=True)]

    def recheck(self, hashes: Sequence[BlockHash]) -> int:
        """Hold cached blocks against their proofs and drop those that have changed; returns how many."""
        found = [block for each in hashes if (block := self.pool.find(each)) is not None]
        wrong = find_wrong(self.memory, [block.slot for block in found], [block.proof for block in found])
        return self.pool.drop(found[position].slot for position in wrong)

    def begin_restore(self, hashes: Sequence[BlockHash]) -> Restore | None:
        """Begin to bring back from the host tier what follows the cached prefix of `hashes`; None: nothing, or no room.

        Whoever gets a Restore has `HostTier.copy_back` fill its blocks, on another thread, and calls `end_restore`.
        """
        return begin_restore(self.host_tier, self._scheduler, hashes) if self.host_tier is not None else None

    def end_restore(self, restore: Restore, copied: CopiedBack) -> None:
        """Publish what came back whole and give the rest back; `copied` is NOTHING_COPIED where that failed."""
        assert self.host_tier is not None, "a restore without a host tier"
        end_restore(self.host_tier, self._scheduler, restore, copied)
        self._grant_reservations()

    def take_host_changes(self) -> list[CacheChange]:
        """What happened to findable blocks of the host tier since the last call, in order."""
        return self.host_tier.take_changes() if self.host_tier is not None else []

    def take_cache_changes(self) -> list[CacheChange]:
        """What happened to findable blocks since the last call, in order."""
        return self.pool.take_changes()

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes, those in the host tier too; the number of paged blocks that could be found."""
        if self.host_tier is not None:
            self.host_tier.reset()
        return self.pool.reset()

    # ---- steps ------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something. False while all that waits waits for memory that others hold."""
        return self._scheduler.has_work

    def schedule(self) -> Batch | None:
        """Choose the next step's work, or None if nothing can run before a command frees memory or brings work."""
        self._step_started_s = self._clock()
        if self.host_tier is not None:
            bring_back(self.host_tier, self._scheduler)
        batch = self._scheduler.schedule()
        if batch is None:
            self._grant_reservations()
            return None
        for sequence in batch.sequences:
            if sequence.is_first:
                sequence.request.timeline.mark(Event.PREFILL_SCHEDULED)
        return batch

    def run(self, batch: Batch) -> SampledBatch:
        """Compute and sample. Changes no bookkeeping; an exception leaves the KV cache unknown."""
        return self._runner.run(batch)

    def postprocess(self, batch: Batch, sampled: SampledBatch) -> StepOutput:
        """Book the step's results."""
        updates = self._scheduler.update(batch, sampled)
        born = self.pool.take_unproven()
        if born:
            self.pool.set_proofs(born, prove(self.memory, born))
        for update in updates:
            timeline = update.request.timeline
            if update.new_tokens and len(update.request.output_token_ids) == 1:
                timeline.mark(Event.PREFILL_FINISHED)
                if update.finish_reason is None:
                    timeline.mark(Event.DECODE_JOINED)
        self._grant_reservations()
        duration_s = self._clock() - self._step_started_s
        return StepOutput(tuple(updates), batch.preempted, batch.num_tokens, batch.shape, duration_s)

    def step(self) -> StepOutput:
        """The three in a row; empty where nothing can run."""
        batch = self.schedule()
        if batch is None:
            return StepOutput()
        return self.postprocess(batch, self.run(batch))

    # ---- state ------------------------------------------------------------------

    @property
    def stats(self) -> SchedulerStats:
        """Counts since the start. Read it from any thread; it is a live object."""
        return self._scheduler.stats

    def load(self) -> EngineLoad:
        """How busy the engine is now. Reads lengths only, so that another thread may ask, and gets a fair estimate."""
        scheduler = self._scheduler
        return EngineLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=self.pool.num_free,
            num_blocks=self.pool.num_blocks,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_cached_blocks=self.pool.num_cached,
            num_lent_blocks=scheduler.loans.num_blocks,
        )

    def check_integrity(self) -> None:
        """Raise unless each block's references are those that requests and callers hold; the host tier likewise."""
        self._scheduler.check_integrity()
        if self.host_tier is not None:
            self.host_tier.check_integrity()

    def _grant_reservations(self) -> None:
        if self.host_tier is not None and self._on_grant:
            bring_back(self.host_tier, self._scheduler)
        # A callback may call back into the engine: each grant is complete before it is told.
        for request, room in self._scheduler.grant_reservations():
            request.timeline.mark(Event.BLOCKS_RESERVED)
            self._on_grant.pop(request.request_id)(room)


def _choose_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def scheduler_config(config: EngineConfig, model: LoadedModel) -> SchedulerConfig:
    """What the scheduler needs to know of the settings and of the model."""
    return SchedulerConfig(
        block_size=config.block_size,
        max_model_len=model.max_model_len,
        model_fingerprint=model.fingerprint,
        eos_token_ids=frozenset(model.eos_token_ids),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_waiting=config.max_num_waiting,
    )


def _check_token_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(param, f"token id {wrong} is not in the vocabulary of {vocab_size}")


def _check_allows_any(sampling: SamplingParams, eos_token_ids: Sequence[int], vocab_size: int) -> None:
    if not sampling.min_tokens:
        return
    ends = sampling.ends(eos_token_ids)
    if sampling.allowed_token_ids and ends.issuperset(sampling.allowed_token_ids):
        raise InvalidRequest("allowed_token_ids", "min_tokens forbids all of them, they end the output")
    if len(ends) >= vocab_size:
        raise InvalidRequest("stop_token_ids", "min_tokens forbids all of them, which is the whole vocabulary")
