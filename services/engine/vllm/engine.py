"""vLLM's EngineCore behind the port (services.engine.api); the room's docstring says how."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine import FinishReason as VllmFinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus

from kvstore.block import BlockHash, BlockLayout, BlockMemory, Proof, ProofKey, Subject
from kvstore.pool import CacheChange
from kvstore.protocol import Reservation
from services.engine.api import (
    Capabilities,
    EngineError,
    EngineLoad,
    EngineStats,
    FinishReason,
    InvalidRequest,
    NotReserved,
    QueueFull,
    Request,
    RequestUpdate,
    SampledToken,
    StepOutput,
    Suspended,
)
from services.engine.foreign import Arrivals, Budgeted, Live, Part, Place, Tierless, Turns, first_steps, shape_of
from services.engine.limits import check_abilities, check_fits, check_tokens, end_of
from services.engine.vllm import sampling
from services.engine.vllm.blocks import BlockBook
from services.engine.vllm.connector import Held, TandemConnector
from services.lifecycle import Event
from services.rates import NO_STEP, RateLearner


@dataclass(frozen=True)
class Model:
    """What is constant of an engine, beside its capabilities."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    max_num_waiting: int
    arrivals: Arrivals
    adapters: Mapping[str, LoRARequest]  # by key


class VllmEngine(Tierless, Budgeted):
    """One EngineCore, its books and its connector; `services.engine.api.Engine` says what methods do."""

    def __init__(
        self,
        core: EngineCore,
        connector: TandemConnector,
        model: Model,
        capabilities: Capabilities,
        layout: BlockLayout,
        memory: BlockMemory,
        proof_key: ProofKey,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.capabilities = capabilities
        self.layout = layout
        self.memory = memory
        self.proof_key = proof_key
        self.step_shape = NO_STEP
        self._core = core
        self._connector = connector
        self._model = model
        self._clock = clock
        self._config = core.vllm_config
        self._scheduler = core.scheduler
        self._manager = core.scheduler.kv_cache_manager
        self._book = BlockBook(self._manager, memory, proof_key, model.arrivals)
        ours = {"publish": lambda batch: self._book.absorb(batch.events), "get_publisher_config": lambda: None}
        self._scheduler.kv_event_publisher = SimpleNamespace(**ours, shutdown=lambda: None)
        connector.plan = self._plan
        self._has_states = not self._config.use_v2_model_runner  # the first runner keeps a request's state, and seeds
        self._has_ranks = self._config.parallel_config.tensor_parallel_size > 1
        self._numbers = itertools.count(1)
        self._live: dict[str, Live] = {}
        self._by_core_id: dict[str, Live] = {}  # QUEUED
        self._turns = Turns()
        self._num_reserved = 0
        self._is_lost = False  # a rank is
        self._is_stuck = False  # the last step found that all that waits, waits for memory
        self._stats = EngineStats()
        self.rates, self._learns = RateLearner(), True
        limits = self._scheduler.scheduler_config = copy.copy(self._config.scheduler_config)
        most = limits.max_num_scheduled_tokens or limits.max_num_batched_tokens
        self.keep_budgets(self.rates, most, limits.long_prefill_token_threshold, limits.enable_chunked_prefill)
        self._scheduled: list[Part] = []
        self._on_begun: Callable[[Request], None] = lambda request: None

    # ---- requests -----------------------------------------------------------------

    def check(self, request: Request) -> None:
        check_abilities(request, self.capabilities.adapters)
        check_tokens(request, self._model.vocab_size, sorted(self._model.eos_token_ids))
        able = self.capabilities
        check_fits(request, able.max_model_len, self.layout.block_size, able.num_blocks)
        try:
            params = sampling.to_vllm(request, self._model.eos_token_ids)
            config = self._config
            params.verify(config.model_config, config.speculative_config, config.structured_outputs_config, None)
        except (ValueError, VLLMValidationError) as error:
            raise InvalidRequest(getattr(error, "parameter", None) or "sampling", str(error)) from error

    def add_request(self, request: Request) -> None:
        self.check(request)
        num_waiting = self._scheduler.get_request_counts()[1] + len(self._turns)
        if num_waiting >= self._model.max_num_waiting:
            raise QueueFull(f"{num_waiting} requests wait, which is the limit")
        live = self._new(request, Place.BEHIND)
        self._turns.add(live)
        request.timeline.mark(Event.PREFILL_QUEUED)
        self._changed()

    def reserve(self, request: Request, callback: Callable[[Reservation], None]) -> None:
        self.check(request)
        live = self._new(request, Place.RESERVING)
        self._turns.reserve(live, callback)
        self._grant()

    def cancel_reservation(self, request: Request) -> bool:
        live = self._live.get(request.request_id)
        if live is None or live.place is not Place.RESERVING:
            return False
        self._forget(live)
        self._changed()
        return True

    def release_reservation(self, request: Request, block_ids: Sequence[int]) -> None:
        self._book.loans.release(block_ids)
        live = self._live.get(request.request_id)
        if live is not None and live.place is Place.RESERVED:
            self._forget(live)
        self._changed()

    def add_prefilled(
        self, request: Request, block_ids: Sequence[int], proofs: Sequence[Proof], first_token: SampledToken | None
    ) -> RequestUpdate:
        if first_token is not None and not 0 <= first_token.token_id < self._model.vocab_size:
            raise InvalidRequest("prompt", f"first token {first_token.token_id} is not in the vocabulary")
        live = self._live.get(request.request_id)
        if live is None or live.place is not Place.RESERVED or len(block_ids) != live.num_context_blocks:
            raise NotReserved(
                f"request {request.request_id} is {live.place.name if live else 'not here'} and comes with"
                f" {len(block_ids)} blocks"
            )
        self._book.loans.take_over(block_ids)
        self._model.arrivals.accept(block_ids)
        request.timeline.mark(Event.DECODE_JOINED)
        told = () if first_token is None else (first_token,)
        outputs = [*request.resumed_token_ids, *(token.token_id for token in told)]
        reason, stop_token_id = self._end_of(live, outputs[-1], len(outputs)) if told else (None, None)
        self._num_reserved -= 1
        live.place, live.was_scheduled, live.has_joined = Place.QUEUED, True, True
        num_full = request.num_context_tokens // self.layout.block_size
        if live.is_shared:
            self._book.publish(block_ids[:num_full], live.hashes[:num_full], proofs[:num_full], None)
        if reason is None:
            self._queue(live, outputs, block_ids)
        else:
            self._book.release(block_ids)
            self._end(live, reason)
        self._changed()
        return live.joined(told, reason, stop_token_id)

    def abort(self, request_id: str) -> bool:
        live = self._live.get(request_id)
        if live is None:
            return False
        self._leave_core(live)
        self._end(live, FinishReason.ABORT)
        self._changed()
        return True

    def suspend(self, request_id: str, transfer_id: bytes) -> Suspended | None:
        live = self._live.get(request_id)
        if live is not None and live.place is Place.BEHIND:
            self._end(live, FinishReason.MOVED)
            return Suspended(len(live.asked.resumed_token_ids))
        if live is None or live.core is None:
            return None
        core, block_ids = live.core, list[int]()
        num_computed = core.num_computed_tokens
        if core.status is RequestStatus.RUNNING:
            if core.num_tokens - num_computed != 1 or not core.num_output_tokens:
                return None
            (table,) = self._manager.get_block_ids(live.core_id)
            block_ids = table[: -(-num_computed // self.layout.block_size)]
        elif (held := self._connector.joining.get(live.core_id)) is not None:
            num_computed, block_ids = held.num_tokens, held.block_ids
        if not live.is_truthful:  # nobody could tell what these blocks are
            block_ids = []
        self._book.loans.lend(block_ids)
        self._leave_core(live)
        self._end(live, FinishReason.MOVED)
        self._changed()
        hashes = live.told_hashes(0, len(block_ids), num_computed // self.layout.block_size)
        return Suspended(core.num_output_tokens, self._book.proofs.announced(block_ids, hashes, transfer_id, 0))

    # ---- blocks and the prefix cache -------------------------------------------------

    def peek_prefix(self, hashes: Sequence[BlockHash]) -> int:
        return self._book.findable.peek(hashes)

    def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        return self._book.lend_prefix(hashes)

    def take_prefix(self, hashes: Sequence[BlockHash]) -> Reservation | None:
        return self._book.take(hashes, len(hashes), self._num_in_batch + self._num_wanted_blocks(None))

    def publish_blocks(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        proofs: Sequence[Proof],
        parent_hash: BlockHash | None = None,
    ) -> None:
        self._book.loans.check(block_ids)
        self._model.arrivals.accept(block_ids)
        if self.capabilities.caches_prefixes:
            self._book.publish(block_ids, hashes, proofs, parent_hash)

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        self._book.loans.release(block_ids)
        self._changed()

    def proofs(self, block_ids: Sequence[int], subjects: Sequence[Subject]) -> list[Proof]:
        return self._book.proofs.proofs(block_ids, subjects)

    def recheck(self, hashes: Sequence[BlockHash]) -> int:
        return self._book.recheck(hashes)

    def cached_hashes(self) -> list[BlockHash]:
        return self._book.findable.hashes()

    def take_cache_changes(self) -> list[CacheChange]:
        return self._book.take_changes()

    # ---- steps and state ---------------------------------------------------------------

    def warm_up(self) -> list[StepOutput]:
        longest = min(self.capabilities.max_model_len, self.capabilities.num_blocks * self.layout.block_size) - 2
        max_num_tokens = min(self._config.scheduler_config.max_num_batched_tokens, longest)
        torch.set_num_threads(torch.get_num_threads())  # OpenMP has a number for each thread, and this one computes
        for temperature in (1.0, 0.0):
            self._learns = temperature == 0.0  # the first steps of all are slow
            outputs = first_steps(self, max_num_tokens, temperature)
            self._core.reset_prefix_cache()
        self.take_cache_changes()
        self._stats = EngineStats()
        return outputs

    @property
    def has_work(self) -> bool:
        if self._is_lost:
            return True
        num_running, num_waiting = self._scheduler.get_request_counts()
        return bool(num_running or (num_waiting and not self._is_stuck))

    def when_lost(self, tell: Callable[[], None]) -> None:
        def lost() -> None:
            self._is_lost = True
            tell()

        if self._has_ranks:
            self._core.model_executor.register_failure_callback(lost)

    def step(self, on_begun: Callable[[Request], None] = lambda request: None) -> StepOutput:
        if self._is_lost:
            raise EngineError("a rank of vLLM's is gone")
        if not self.has_work:
            return StepOutput()
        started_s, self._on_begun = self._clock(), on_begun
        try:
            outputs = self._run()
            shape, scheduled = self.step_shape, self._scheduled
        finally:
            self.step_shape, self._scheduled = NO_STEP, []
        if not scheduled:
            self._is_stuck = True
            self._grant()
            return StepOutput()
        self._stats.num_steps += 1
        self.prompt_budget.end(carries_prompts=shape.num_prompt_tokens > 0)
        if self._has_ranks and self.memory.device != "cpu":
            self._core.collective_rpc("tandem_finish")
        block_size = self.layout.block_size
        for each in scheduled:
            num_full = each.live.core.num_computed_tokens // block_size
            self._book.proofs.prove(each.block_ids[each.start // block_size : num_full])
        for held in self._connector.joined:
            self._book.release(held.block_ids)
        self._connector.joined.clear()
        updates = tuple(self._booked(each, outputs.get(each.live.core_id)) for each in scheduled)
        self._changed()
        num_tokens = sum(each.num_tokens for each in scheduled)
        output = StepOutput(updates, num_tokens, shape, self._clock() - started_s)
        if self._learns:
            self.rates.step_ended(shape, output.duration_s)
        return output

    @property
    def stats(self) -> EngineStats:
        return replace(self._stats, num_corrupt_blocks=self._book.num_corrupt)

    def load(self) -> EngineLoad:
        num_running, num_waiting = self._scheduler.get_request_counts()
        lives, joining = list(self._by_core_id.values()), self._connector.joining
        cores = [live.core for live in lives if live.core is not None and live.core_id not in joining]
        waiting = [core.num_tokens - core.num_computed_tokens for core in cores]
        return EngineLoad(
            num_running=num_running,
            num_waiting=num_waiting + len(self._turns) + self._num_reserved,
            num_free_blocks=self._book.num_free,
            num_blocks=self.capabilities.num_blocks,
            num_waiting_tokens=sum(num_tokens for num_tokens in waiting if num_tokens > 1)
            + self._turns.num_waiting_tokens,
            num_cached_blocks=len(self._book.findable.hashes()),
            num_lent_blocks=self._book.loans.num_blocks,
            num_context_tokens=sum(core.num_tokens for core, n in zip(cores, waiting, strict=True) if n == 1),
        )

    def check_integrity(self) -> None:
        tables = [self._manager.get_block_ids(core_id)[0] for core_id in self._scheduler.requests]
        self._book.check_integrity([*tables, *(held.block_ids for held in self._connector.joining.values())])

    # ---- entering and leaving -----------------------------------------------------------

    def _new(self, request: Request, place: Place) -> Live:
        if request.request_id in self._live:
            raise InvalidRequest("request_id", f"{request.request_id} is another live request's")
        block_size, shares = self.layout.block_size, self.capabilities.caches_prefixes
        live = Live.of(request, next(self._numbers), place, self.layout.model_fingerprint, block_size, shares=shares)
        self._live[request.request_id] = live
        return live

    def _queue(self, live: Live, output_token_ids: Sequence[int], block_ids: Sequence[int] | None) -> None:
        """Give it to vLLM, as one that was preempted after `output_token_ids`; `block_ids` hold all but the newest."""
        asked, outputs = live.asked, list(output_token_ids)
        params = sampling.to_vllm(asked, self._model.eos_token_ids, tells_prompt=block_ids is None)
        prompt = list(asked.prompt_token_ids)
        adapter = self._model.adapters.get(asked.adapter)
        live.core = core = VllmRequest(
            live.core_id,
            prompt,
            params,
            None,
            arrival_time=asked.arrival_s,
            priority=asked.priority,
            lora_request=adapter,
            block_hasher=lambda each: live.new_keys(len(each.block_hashes), each.all_token_ids),
        )
        if outputs:
            core.append_output_token_ids(outputs)
            core.prefill_stats = None  # they know no output before the first step
            if self._has_states:
                core.status = RequestStatus.PREEMPTED
                self._core.collective_rpc("tandem_prepare", args=(live.core_id, prompt, list(outputs), params, adapter))
        if block_ids is not None:
            self._connector.joining[live.core_id] = Held(list(block_ids), core.num_tokens - 1)
        live.place = Place.QUEUED
        self._by_core_id[live.core_id] = live
        self._core.add_request(core)

    def _leave_core(self, live: Live) -> None:
        if live.core is None:
            return
        held = self._connector.joining.pop(live.core_id, None)
        if held is not None:
            self._book.release(held.block_ids)
        self._core.abort_requests([live.core_id])

    def _end(self, live: Live, reason: FinishReason) -> None:
        self._stats.num_finished[reason] += 1
        self._forget(live)

    def _forget(self, live: Live) -> None:
        del self._live[live.asked.request_id]
        self._by_core_id.pop(live.core_id, None)
        self._turns.leave(live)
        self._num_reserved -= live.place is Place.RESERVED

    # ---- reservations -------------------------------------------------------------------

    @property
    def _num_in_batch(self) -> int:
        """Requests that have a place, or are to have one: each may want a block at the next step."""
        num_running, _ = self._scheduler.get_request_counts()
        return int(num_running) + self._num_reserved + len(self._connector.joining)

    def _changed(self) -> None:
        """Something came, went or became free."""
        self._is_stuck = False
        self._grant()

    def _grant(self) -> None:
        """Give blocks to the reservations whose turn it is, and let those go on that came after them."""
        granted: list[tuple[Callable[[Reservation], None], Reservation]] = []
        while self._num_in_batch < self.capabilities.max_num_seqs:
            live = self._turns.next_reservation
            if live is None:
                break
            headroom = self._num_in_batch + self._num_wanted_blocks(live)
            room = self._book.take(live.findable_hashes, live.num_context_blocks, headroom)
            if room is None:
                break
            live.place = Place.RESERVED
            self._num_reserved += 1
            live.asked.timeline.mark(Event.BLOCKS_RESERVED)
            granted.append((self._turns.grant(), room))
        for next_one in self._turns.take_free():
            self._queue(next_one, next_one.asked.resumed_token_ids, None)
            self._is_stuck = False
        for callback, room in granted:  # which may call back into the engine
            callback(room)

    def _num_wanted_blocks(self, live: Live | None) -> int:
        """Blocks that others will want before `live`: for prompts that vLLM has begun, or that came earlier."""
        num_wanted = 0
        for other in self._by_core_id.values():
            core = other.core
            if core is None or other.core_id in self._connector.joining:
                continue
            is_running = core.status is RequestStatus.RUNNING
            if is_running or (live is not None and other.order < live.order):
                num_held = len(self._manager.get_block_ids(other.core_id)[0]) if is_running else 0
                num_wanted += max(0, -(-core.num_tokens // self.layout.block_size) - num_held)
        return num_wanted

    # ---- one step -------------------------------------------------------------------------

    def _run(self) -> dict[str, EngineCoreOutput]:
        """Run one step; its results by vLLM's request id."""
        while True:
            self._limit()
            outputs, has_run = self._core.step_fn()
            self._core.post_step(has_run)
            if self._scheduled or not self._give_up_a_joining_one():
                return {each.request_id: each for of_client in (outputs or {}).values() for each in of_client.outputs}

    def _next_start(self) -> int | None:
        """Where the first prompt of vLLM's queue would begin."""
        waiting = (self._by_core_id[core.request_id] for core in self._scheduler.waiting)
        live = next((each for each in waiting if each.core_id not in self._connector.joining), None)
        return None if live is None else self._book.findable.peek(live.findable_hashes) * self.layout.block_size

    def _limit(self) -> None:
        """Have vLLM's scheduler keep to the budgets in the next step."""
        scheduler, num_joining = self._scheduler, len(self._connector.joining)
        running = [
            (asked, core.num_tokens, core.num_computed_tokens, core.num_output_tokens, len(core.spec_token_ids))
            for core, asked in ((core, self._by_core_id[core.request_id].asked) for core in scheduler.running)
        ]
        limits = self.limits(running, num_joining * (1 + scheduler.num_spec_tokens), self._next_start)
        if limits.is_bounded:  # streams come first: their tokens are not a prompt's
            scheduler.running.sort(key=lambda core: core.num_tokens - core.num_computed_tokens > 1)
        scheduler.max_num_scheduled_tokens = limits.num_tokens
        scheduler.scheduler_config.long_prefill_token_threshold = limits.per_request
        self._connector.may_begin = limits.may_begin

    def _give_up_a_joining_one(self) -> bool:
        """Where nothing can run since all blocks are held, let the last one's go: it is computed again."""
        if self._scheduler.get_request_counts()[0] or not self._connector.joining:
            return False
        last = max((self._by_core_id[core_id] for core_id in self._connector.joining), key=lambda live: live.order)
        self._book.release(self._connector.joining.pop(last.core_id).block_ids)
        last.core.num_preemptions += 1
        return True

    def _plan(self, output: SchedulerOutput) -> dict[str, int]:
        """Hear from the connector what the step computes, before it does; returns where seeded draws will stand."""
        self._scheduled = [
            self._part(
                core_id,
                num_tokens,
                output.scheduled_spec_decode_tokens.get(core_id, ()),
                output.kv_connector_block_state.get_block_ids(core_id)[0],
            )
            for core_id, num_tokens in output.num_scheduled_tokens.items()
        ]
        self.step_shape = shape_of(self._scheduled)
        for each in self._scheduled:
            if not each.live.was_scheduled:
                self._begin(each)
        if not self._has_states:
            return {}
        return {each.live.core_id: each.end for each in self._scheduled if not each.live.asked.sampling.is_greedy}

    def _part(self, core_id: str, num_tokens: int, drafted: Sequence[int], block_ids: list[int]) -> Part:
        live = self._by_core_id[core_id]
        start, lent = live.core.num_computed_tokens, list[int]()
        if live.asked.hold_blocks:
            # Now, since vLLM frees the blocks of one that ends before we hear of it.
            num_context, end = live.asked.num_context_tokens, start + num_tokens
            last = live.num_context_blocks if end >= num_context else end // live.block_size
            lent = block_ids[live.num_lent_blocks : last]
            self._book.loans.lend(lent)
        return Part(live, start, num_tokens, list(drafted), list(block_ids), lent)

    def _begin(self, part: Part) -> None:
        live = part.live
        live.was_scheduled, live.num_cached_tokens = True, part.start
        part.count_begin(self._stats)
        live.asked.timeline.mark(Event.PREFILL_SCHEDULED)
        self._on_begun(live.asked)

    def _booked(self, part: Part, output: EngineCoreOutput | None) -> RequestUpdate:
        live, core, asked = part.live, part.live.core, part.live.asked
        tokens = tuple[SampledToken, ...]()
        reason: FinishReason | None = None
        stop_token_id = told = None
        if output is not None:
            tokens = sampling.sampled_tokens(output.new_token_ids, output.new_logprobs)
            if output.new_prompt_logprobs_tensors is not None:
                told = sampling.prompt_logprobs(output.new_prompt_logprobs_tensors)
            if output.finish_reason is not None:
                reason, stop_token_id = self._reason(live, output)
        num_outputs = core.num_output_tokens
        part.count(self._stats, core.num_preemptions, len(tokens) if output is not None else None)
        if tokens and not live.has_joined and num_outputs - len(tokens) == len(asked.resumed_token_ids):
            asked.timeline.mark(Event.PREFILL_FINISHED)
            if reason is None:
                asked.timeline.mark(Event.DECODE_JOINED)
        first = live.num_lent_blocks
        live.num_lent_blocks += len(part.lent)
        hashes = live.told_hashes(first, len(part.lent), asked.num_context_tokens // live.block_size)
        if reason is not None:
            self._end(live, reason)
        return RequestUpdate(
            request=asked,
            num_computed_tokens=live.core.num_computed_tokens,
            new_tokens=tokens,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            prompt_logprobs=told,
            failure="vLLM ended it with an error" if reason is FinishReason.ERROR else None,
            num_output_tokens=num_outputs,
            num_cached_tokens=live.num_cached_tokens,
            num_preemptions=live.num_preemptions,
            first_block=first,
            blocks=self._book.proofs.announced(part.lent, hashes, asked.transfer_id, first),
        )

    def _reason(self, live: Live, output: EngineCoreOutput) -> tuple[FinishReason, int | None]:
        """Why vLLM ended it, in our words."""
        if output.finish_reason not in (VllmFinishReason.STOP, VllmFinishReason.LENGTH) or not output.new_token_ids:
            return FinishReason.ERROR, None
        reason, stop_token_id = self._end_of(live, output.new_token_ids[-1], live.core.num_output_tokens)
        # None: it came too early, before min_tokens, as where no logit is a number.
        return FinishReason.ERROR if reason is None else reason, stop_token_id

    def _end_of(self, live: Live, token_id: int, num_outputs: int) -> tuple[FinishReason | None, int | None]:
        return end_of(live.asked, token_id, num_outputs, self._model.eos_token_ids, self.capabilities.max_model_len)
