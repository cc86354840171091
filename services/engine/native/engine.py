"""Tandem's engine behind the port (services.engine.api): a step is schedule, run, postprocess."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kvstore.block import BlockHash, BlockLayout, BlockMemory, Proof, ProofKey, Subject, subject_of
from kvstore.pool import BlockPool, CacheChange
from kvstore.protocol import AnnouncedBlock, Reservation
from services.budgets import Budgets
from services.engine import api
from services.engine.api import (
    Capabilities,
    EngineLoad,
    EngineStats,
    InvalidRequest,
    RequestUpdate,
    Restore,
    SampledToken,
    StepOutput,
    Suspended,
)
from services.engine.config import EngineConfig, with_device_defaults
from services.engine.limits import check_abilities, check_fits, check_tokens
from services.engine.native.drafting import DraftingRunner, DraftModel, speculation_of
from services.engine.native.loading import load, memory_that_runs_out_told
from services.engine.native.memory import begin_restore, block_memory, bring_back, open_host_tier
from services.engine.native.model import LoadedModel
from services.engine.native.runner import ModelRunner, Runner
from services.engine.native.scheduling import Batch, Request, SampledBatch, Scheduler, SchedulerConfig
from services.engine.native.warm_up import warm_up
from services.engine.tensor_memory import gpu_of
from services.lifecycle import Event
from services.rates import NO_STEP, RateLearner


class Engine:
    """Scheduler, block pool, KV cache and model of one worker; `services.engine.api.Engine` says what methods do."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        num_blocks: int,
        clock: Callable[[], float] = time.time,
        num_host_slots: int = 0,
        wrap_runner: Callable[[Runner], Runner] = lambda runner: runner,
        proof_key: ProofKey | None = None,
        draft: LoadedModel | None = None,
    ) -> None:
        """`num_host_slots`: blocks in the host tier; 0: there is none. `wrap_runner` may put one around ours.

        `proof_key`: None takes the public one. `draft`: the model that guesses, if one does.
        """
        config = with_device_defaults(config, gpu_of(model.device))
        self.model = model
        self.config = config
        self.capabilities = Capabilities(
            max_model_len=model.max_model_len,
            max_num_seqs=config.max_num_seqs,
            num_blocks=num_blocks,
            num_host_blocks=num_host_slots,
            caches_prefixes=config.enable_prefix_caching,
            kv_cache_dtype=model.dtype if model.kv_cache_dtype == "auto" else model.kv_cache_dtype,
            is_exact=model.compute_path.is_exact,
            compute={
                "device": model.device,
                "kernels": model.compute_path.kernels,
                "quantization": model.compute_path.quantization,
            },
            is_simulation=model.compute_path.is_simulation,
            numerics=model.compute_path.numerics,
        )
        self.proof_key = proof_key or ProofKey.public()
        self.layout: BlockLayout = replace(model.block_layout(config.block_size), proof_key=self.proof_key.key_id)
        self.kv_cache: Tensor = model.new_kv_cache(num_blocks, config.block_size)
        self.memory: BlockMemory = block_memory(self.kv_cache)
        tier = open_host_tier(self.kv_cache, self.memory, num_host_slots, self.proof_key) if num_host_slots else None
        self.host_tier = tier
        self.pool = BlockPool(num_blocks, config.enable_prefix_caching, tier.take_evicted if tier is not None else None)
        self.rates = RateLearner()
        self._runner = wrap_runner(ModelRunner(model, self.kv_cache, config.block_size))
        self._drafting: DraftingRunner | None = None
        if draft is not None:
            drafting = DraftModel(draft, num_blocks, config.block_size, clock)
            self._runner = self._drafting = DraftingRunner(self._runner, drafting, clock)
        speculation = speculation_of(config, self.rates, self._drafting)
        self._scheduler = Scheduler(scheduler_config(config, model), self.pool, speculation, self.rates)
        self._on_grant: dict[str, Callable[[Reservation], None]] = {}  # by id of a reserving request
        self._clock = clock
        self._step_started_s = 0.0
        self.step_shape = NO_STEP

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.time,
        proof_key: ProofKey | None = None,
    ) -> Engine:
        """Load the model and take the memory. Raises `ModelError` or `SettingsError`."""
        with memory_that_runs_out_told(config):
            loaded = load(config, progress)
            return cls(
                loaded.model,
                config,
                loaded.num_blocks,
                clock,
                loaded.num_host_slots,
                proof_key=proof_key,
                draft=loaded.draft,
            )

    # ---- commands, between steps ----------------------------------------------

    def check(self, request: api.Request) -> None:
        check_abilities(request, self.capabilities.adapters)
        check_tokens(request, self.model.config.vocab_size, self.model.eos_token_ids)
        check_fits(request, self.model.max_model_len, self.config.block_size, self.pool.num_blocks)

    def add_request(self, request: api.Request) -> None:
        self.check(request)
        self._scheduler.add(Request.of(request))
        request.timeline.mark(Event.PREFILL_QUEUED)

    def reserve(self, request: api.Request, callback: Callable[[Reservation], None]) -> None:
        self.check(request)
        self._scheduler.reserve(Request.of(request))
        self._on_grant[request.request_id] = callback
        self._grant_reservations()

    def cancel_reservation(self, request: api.Request) -> bool:
        cancelled = self._scheduler.cancel_reservation(request)
        if cancelled:
            del self._on_grant[request.request_id]
            self._grant_reservations()
        return cancelled

    def release_reservation(self, request: api.Request, block_ids: Sequence[int]) -> None:
        self._scheduler.release_reservation(request, block_ids)
        self._grant_reservations()

    def add_prefilled(
        self, request: api.Request, block_ids: Sequence[int], proofs: Sequence[Proof], first_token: SampledToken | None
    ) -> RequestUpdate:
        if first_token is None:
            raise InvalidRequest("prompt", "this engine goes on from a first token")
        if not 0 <= first_token.token_id < self.model.config.vocab_size:
            raise InvalidRequest("prompt", f"first token {first_token.token_id} is not in the vocabulary")
        update = self._scheduler.add_prefilled(request, block_ids, proofs, first_token)
        request.timeline.mark(Event.DECODE_JOINED)
        self._grant_reservations()
        return update

    def abort(self, request_id: str) -> bool:
        aborted = self._scheduler.abort(request_id)
        self._on_grant.pop(request_id, None)
        self._grant_reservations()
        return aborted

    def suspend(self, request_id: str, transfer_id: bytes) -> Suspended | None:
        request = self._scheduler.suspend(request_id)
        if request is None:
            return None
        block_ids, num_full = request.block_table, request.num_computed_tokens // self.layout.block_size
        hashes: list[BlockHash | None] = [*request.block_hashes[:num_full], None][: len(block_ids)]
        if not request.may_publish or len(hashes) < len(block_ids):
            # Its hashes are not those of its tokens: nobody could tell what these blocks are.
            self._scheduler.release_lent(block_ids)
            block_ids = []
        self._grant_reservations()
        subjects = [subject_of(each, transfer_id, index) for index, each in enumerate(hashes[: len(block_ids)])]
        blocks = tuple(map(AnnouncedBlock, block_ids, hashes, self.proofs(block_ids, subjects)))
        return Suspended(len(request.output_token_ids), blocks)

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        self._scheduler.release_lent(block_ids)
        self._grant_reservations()

    def peek_prefix(self, hashes: Sequence[BlockHash]) -> int:
        return self.pool.peek_prefix(hashes)

    def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        return self._scheduler.lend_prefix(hashes)

    def take_prefix(self, hashes: Sequence[BlockHash]) -> Reservation | None:
        return self._scheduler.take_prefix(hashes)

    def publish_blocks(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        proofs: Sequence[Proof],
        parent_hash: BlockHash | None = None,
    ) -> None:
        self._scheduler.publish_lent(block_ids, hashes, proofs, parent_hash)

    def proofs(self, block_ids: Sequence[int], subjects: Sequence[Subject]) -> list[Proof]:
        # As published, else made now: of new blocks, or of a partial one.
        known = self.pool.proofs(block_ids)
        fresh = {
            block_id: subject
            for block_id, subject, proof in zip(block_ids, subjects, known, strict=True)
            if proof is None
        }
        made = dict(zip(fresh, self.proof_key.prove(self.memory, list(fresh), list(fresh.values())), strict=True))
        return [made[block_id] if proof is None else proof for block_id, proof in zip(block_ids, known, strict=True)]

    def recheck(self, hashes: Sequence[BlockHash]) -> int:
        found = [block for each in hashes if (block := self.pool.find(each)) is not None]
        slots, subjects = [block.slot for block in found], [subject_of(block.block_hash) for block in found]
        wrong = self.proof_key.find_wrong(self.memory, slots, subjects, [block.proof for block in found])
        return self.pool.drop(found[position].slot for position in wrong)

    def begin_restore(self, hashes: Sequence[BlockHash]) -> Restore | None:
        if self.host_tier is None:
            return None
        return begin_restore(self.host_tier, self._scheduler, hashes, on_ended=self._grant_reservations)

    def may_restore(self, block_hash: BlockHash) -> bool:
        return self.host_tier is not None and self.host_tier.may_have(block_hash)

    def take_host_changes(self) -> list[CacheChange]:
        return self.host_tier.take_changes() if self.host_tier is not None else []

    def host_hashes(self) -> list[BlockHash]:
        return self.host_tier.hashes() if self.host_tier is not None else []

    def host_figures(self) -> Mapping[str, float]:
        return self.host_tier.state() if self.host_tier is not None else {}

    def cached_hashes(self) -> list[BlockHash]:
        return self.pool.hashes()

    def take_cache_changes(self) -> list[CacheChange]:
        return self.pool.take_changes()

    # ---- steps ------------------------------------------------------------------

    def set_budgets(self, budgets: Budgets) -> None:
        self._scheduler.prompt_budget.budgets = budgets

    @property
    def budgets(self) -> Budgets:
        return self._scheduler.prompt_budget.budgets

    def warm_up(self) -> Sequence[StepOutput]:
        if self._drafting is not None:
            self._drafting.draft.warm_up(self._scheduler.config, self.pool.num_blocks)
        outputs = warm_up(self._runner, self._scheduler.config, self.pool.num_blocks, self._clock)
        for output in outputs:
            self.rates.step_ended(output.shape, output.duration_s)
        return outputs

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def when_lost(self, tell: Callable[[], None]) -> None:
        """All that computes is in this process."""

    def step(self, on_begun: Callable[[api.Request], None] = lambda request: None) -> StepOutput:
        batch = self._schedule(on_begun)
        if batch is None:
            return StepOutput()
        self.step_shape = batch.shape
        try:
            return self._postprocess(batch, self._runner.run(batch))
        finally:
            self.step_shape = NO_STEP

    def _schedule(self, on_begun: Callable[[api.Request], None]) -> Batch | None:
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
                on_begun(sequence.request)
        return batch

    def _postprocess(self, batch: Batch, sampled: SampledBatch) -> StepOutput:
        """Book the step's results."""
        updates = self._scheduler.update(batch, sampled)
        for update in updates:
            timeline = update.request.timeline
            if update.new_tokens and update.num_output_tokens == len(update.request.resumed_token_ids) + 1:
                timeline.mark(Event.PREFILL_FINISHED)  # before its blocks are proven: that is part of handing them over
                if update.finish_reason is None:
                    timeline.mark(Event.DECODE_JOINED)
        if born := self.pool.take_unproven():
            ids, subjects = list(born), [subject_of(block_hash) for block_hash in born.values()]
            self.pool.set_proofs(ids, self.proof_key.prove(self.memory, ids, subjects))
        updates = [self._lend_prompt(update) if update.request.hold_blocks else update for update in updates]
        self._grant_reservations()
        duration_s = self._clock() - self._step_started_s
        output = StepOutput(tuple(updates), batch.num_tokens, self.step_shape, duration_s)
        # The draft model's passes have a learner of their own.
        drafting_s = self._drafting.drafting_s if self._drafting is not None else 0.0
        self.rates.step_ended(output.shape, duration_s - drafting_s)
        return output

    def _lend_prompt(self, update: RequestUpdate) -> RequestUpdate:
        """Lend the caller what the step completed of a prompt that another worker goes on from."""
        request = Request.of(update.request)
        first, is_last = request.num_lent_blocks, bool(update.new_tokens)
        num_full = request.num_context_tokens // self.layout.block_size
        end = num_full + 1 if is_last else update.num_computed_tokens // self.layout.block_size
        block_ids = request.block_table[first:end]
        # A block that the first token fills up is still the prompt's partial block: it has no identity yet.
        hashes: list[BlockHash | None] = [*request.block_hashes[:num_full], None][first : first + len(block_ids)]
        if not request.may_publish:  # the hashes that it came with are wrong: nothing is proven to be what they say
            hashes = [None] * len(block_ids)
        self._scheduler.loans.lend(block_ids)
        request.num_lent_blocks += len(block_ids)
        subjects = [subject_of(each, request.transfer_id, index) for index, each in enumerate(hashes, first)]
        blocks = tuple(map(AnnouncedBlock, block_ids, hashes, self.proofs(block_ids, subjects)))
        if is_last:
            self._scheduler.release_lent(request.block_table)  # the request's own; the caller's stay
        return replace(update, first_block=first, blocks=blocks)

    # ---- state ------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        return replace(self._scheduler.stats, num_corrupt_blocks=self.pool.stats.num_corrupt)

    def load(self) -> EngineLoad:
        scheduler = self._scheduler
        return EngineLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=self.pool.num_free,
            num_blocks=self.pool.num_blocks,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_cached_blocks=len(self.pool),
            num_lent_blocks=scheduler.loans.num_blocks,
            num_context_tokens=scheduler.num_stream_tokens,
        )

    def check_integrity(self) -> None:
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


def scheduler_config(config: EngineConfig, model: LoadedModel) -> SchedulerConfig:
    """Derives the scheduler's configuration from the settings and the model."""
    return SchedulerConfig(
        block_size=config.block_size,
        max_model_len=model.max_model_len,
        model_fingerprint=model.fingerprint,
        eos_token_ids=frozenset(model.eos_token_ids),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_waiting=config.max_num_waiting,
    )
