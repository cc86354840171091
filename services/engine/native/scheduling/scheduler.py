"""Batches continuously: decides what each step computes, and which request holds which block.

Pure: no clock, no tensors, no threads. A step is `schedule` (takes blocks, returns a Batch), then the runner, then
`update` (books the result, publishes full blocks, frees finished requests). Where each request stands is kept in
`queues.py`, who enters next and with which blocks is decided in `admission.py`. The rules, in order:

1.  One order for everything: (priority, arrival, order of coming). Smaller is sooner.
2.  Running requests that decode get one token each. Where a block is missing, the running request that comes last in
    the order is preempted: it gives back all its blocks, returns to the queue and later computes its tokens again.
3.  Then prompts, in chunks, while the token budget lasts, and beside streams the worker's budgets
    (services.engine.prompt_budget): those that run already, then the queue. A prompt takes the blocks for all its
    tokens when it enters, so a started prompt never waits for memory. One whose next block a running prompt is
    computing waits for that block instead of computing it again; others pass it.
4.  Who enters leaves one free block for each request that runs (it will want it within block_size steps), or there
    would be a preemption right away. With nothing running, it may take everything: progress is certain.
5.  Reservations (blocks to read a prompt into that another worker computes) enter by the same order and the same
    rule, at any moment and without token budget. Neither they nor the queue pass an earlier one of the other kind that
    waits for memory or a place.
6.  Guesses, where there is speculation, take what the step leaves of its budget and of free blocks. Nobody is preempted
    for them, and a block that holds none but wrong ones is free again when the step has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvstore.block import BlockHash, Proof
from kvstore.pool import BlockPool
from kvstore.protocol import Reservation
from services.engine import api
from services.engine.api import (
    EngineError,
    EngineStats,
    FinishReason,
    NotReserved,
    QueueFull,
    RequestUpdate,
    SampledToken,
)
from services.engine.limits import check_fits
from services.engine.loans import Loans
from services.engine.native.scheduling.admission import Admission
from services.engine.native.scheduling.batch import (
    Batch,
    BatchBuilder,
    SampledBatch,
    SampledSequence,
    ScheduledSequence,
)
from services.engine.native.scheduling.block_tables import extend_block_hashes, publish_full_blocks
from services.engine.native.scheduling.drafts import add_drafts, free_wrong_guesses
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.queues import RequestQueues
from services.engine.native.scheduling.request import Request, RequestStatus
from services.engine.native.speculation import Speculation
from services.engine.prompt_budget import PromptBudget
from services.rates import RateLearner


class Scheduler:
    """Owns the queues and, with the pool, every block reference that is not lent to a caller. One thread only.

    The port (`services.engine.api`) says what the outside may expect of the methods of the same name.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        speculation: Speculation | None = None,
        rates: RateLearner | None = None,
    ) -> None:
        """`rates`: by which it keeps to a TPOT budget; None: the guess."""
        self.config = config
        self.pool = pool
        self._speculation = speculation
        self.loans = Loans(pool)
        self.stats = EngineStats()
        self.prompt_budget = PromptBudget(rates or RateLearner())
        self._queues = RequestQueues()
        self._admission = Admission(config, pool, self._queues, self.stats)
        self._in_flight: Batch | None = None
        self._dying: list[list[int]] = []  # block tables of requests aborted in mid-step; freed by `update`

    # ---- what the outside asks ----------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `schedule` can be expected to return a batch."""
        return bool(self._queues.running) or self._admission.may_admit

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a place: waiting, preempted, or waiting for blocks or bytes of a transfer."""
        return self._queues.num_queued + len(self._queues.reserved)

    @property
    def num_waiting_tokens(self) -> int:
        return self._queues.num_waiting_tokens

    @property
    def num_stream_tokens(self) -> int:
        return self._queues.num_stream_tokens

    def add(self, request: Request) -> None:
        self._enter(request, RequestStatus.WAITING)
        self._admission.note_change()

    def reserve(self, request: Request) -> None:
        """Queue a request for blocks to read its prompt into; `grant_reservations` returns them.

        Raises `InvalidRequest`. Never `QueueFull`: another worker has computed some of the prompt by now, so whoever
        orders that bounds how many there are.
        """
        self._enter(request, RequestStatus.RESERVING)

    def cancel_reservation(self, asked: api.Request) -> bool:
        request = self._queues.live(asked.request_id)
        if request is None or request.status is not RequestStatus.RESERVING:
            return False
        self._queues.move(request, RequestStatus.NEW)
        self._admission.note_change()
        return True

    def release_reservation(self, asked: api.Request, block_ids: Sequence[int]) -> None:
        """Take back the blocks of a reservation that came to nothing, and its place if it has one still."""
        self.release_lent(block_ids)
        request = self._queues.live(asked.request_id)
        if request is not None and request.status is RequestStatus.RESERVED:
            self._queues.move(request, RequestStatus.NEW)

    def abort(self, request_id: str) -> bool:
        """End a live request; blocks that the step in progress writes to are freed when that ends."""
        request = self._queues.live(request_id)
        if request is None:
            return False
        if request.status is RequestStatus.RUNNING:
            self._free_blocks(request)
        self._end(request, FinishReason.ABORT)
        return True

    def suspend(self, request_id: str) -> Request | None:
        """End a request that decodes, or that has not begun; its block table becomes the caller's. Between steps only.

        None, changing nothing, for one whose prompt is being computed, or whose blocks are a transfer's.
        """
        assert self._in_flight is None, "suspend was called in mid-step"
        request = self._queues.live(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            if request.num_tokens - request.num_computed_tokens != 1 or not request.output_token_ids:
                return None
            self.loans.pass_over(request.block_table)
        elif request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return None
        self._end(request, FinishReason.MOVED)
        return request

    def release_lent(self, block_ids: Sequence[int]) -> None:
        """Take back references that were lent. Raises `NotLent`, changing nothing, for one that was not."""
        self.loans.release(block_ids)
        self._admission.note_change()

    def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        block_ids = self.pool.match_prefix(hashes)
        self.loans.pass_over(block_ids)
        return block_ids

    def take_prefix(self, hashes: Sequence[BlockHash]) -> Reservation | None:
        blocks = self._admission.take_prefix(hashes)
        if blocks is not None:
            self.loans.pass_over(blocks.block_ids)
        return blocks

    def publish_lent(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        proofs: Sequence[Proof],
        parent_hash: BlockHash | None = None,
    ) -> None:
        """Make lent blocks findable that the caller filled and verified: a run of a chain. Raises `NotLent`."""
        self.loans.check(block_ids)
        for block_id, block_hash, proof in zip(block_ids, hashes, proofs, strict=True):
            self.pool.publish(block_id, block_hash, parent_hash, proof)
            parent_hash = block_hash

    def next_prefixes(self, max_requests: int) -> list[Sequence[BlockHash]]:
        """The block hashes of those whose turn comes next (`Admission.next_prefixes`); none in mid-step."""
        return self._admission.next_prefixes(max_requests) if self._in_flight is None else []

    def grant_reservations(self) -> list[tuple[Request, Reservation]]:
        """Give blocks to the reservations whose turn it is. Between steps only: in mid-step it grants nothing."""
        granted = self._admission.grant_reservations() if self._in_flight is None else []
        for _, room in granted:
            self.loans.pass_over(room.block_ids)
        return granted

    def add_prefilled(
        self, asked: api.Request, block_ids: Sequence[int], proofs: Sequence[Proof], first_token: SampledToken
    ) -> RequestUpdate:
        num_needed = self.config.num_blocks_for(asked.num_context_tokens)
        request = self._queues.live(asked.request_id)
        if request is None or request.status is not RequestStatus.RESERVED or len(block_ids) != num_needed:
            raise NotReserved(
                f"request {asked.request_id} is {request.status.name if request else 'not here'} and comes with "
                f"{len(block_ids)} blocks; it must be RESERVED and needs {num_needed}"
            )
        self.loans.take_over(block_ids)
        self._queues.move(request, RequestStatus.RUNNING)
        request.block_table = list(block_ids)
        request.was_scheduled = True
        request.num_computed_tokens = request.num_context_tokens
        publish_full_blocks(self.pool, request, self.config, proofs)
        return self._book_tokens(ScheduledSequence(request, 0, 0, False, True, None), (first_token,))

    def schedule(self) -> Batch | None:
        """Choose the next step's work and take its blocks; None where nothing can run. `update` must follow."""
        assert self._in_flight is None, "schedule was called twice without update"
        budget = self.prompt_budget
        step = BatchBuilder(self.config.max_num_batched_tokens, self.config.max_prompt_logprob_rows, budget)
        self._schedule_decodes(step)
        budget.begin(each.request.tpot_s for each in step.sequences if each.generates)
        self._schedule_started_prompts(step)
        self._admission.admit_queue(step)
        budget.end(carries_prompts=step.carries_prompts)
        if self._speculation is not None:
            add_drafts(step, self._speculation, self.pool, self.config)
        if not step.sequences:
            assert not self._queues.running or step.preempted, "requests run and none could be scheduled"
            assert not step.held_block_ids, "copies were ordered for a step without sequences"
            return None
        self._in_flight = step.build()
        return self._in_flight

    def update(self, batch: Batch, sampled: SampledBatch) -> list[RequestUpdate]:
        """Book a finished step: tokens, full blocks into the prefix cache, finished requests out.

        One update per sequence of the batch, except for requests that were aborted meanwhile.
        """
        assert batch is self._in_flight, "update of a batch that is not in flight"
        self._in_flight = None
        for block_table in self._dying:
            self.pool.release(block_table)
        self._dying.clear()
        self.pool.release(batch.held_block_ids)
        self.stats.num_steps += 1
        return [
            self._book_sequence(sequence, result)
            for sequence, result in zip(batch.sequences, sampled.sequences, strict=True)
            if sequence.request.status is RequestStatus.RUNNING
        ]

    def check_integrity(self) -> None:
        """Raise unless every request is in one place that fits its status, and every reference has a holder."""
        held = self.loans.references()
        for block_table in self._dying:
            held.update(block_table)
        for entry in self._queues.running:
            held.update(entry.request.block_table)
        if self._in_flight is not None:
            held.update(self._in_flight.held_block_ids)
        self.pool.check_integrity(held)
        self._queues.check_integrity()
        problems = [
            f"{entry.request.request_id} has {len(entry.request.block_table)} blocks for "
            f"{entry.request.num_computed_tokens} computed tokens"
            for entry in self._queues.running
            if len(entry.request.block_table) < self.config.num_blocks_for(entry.request.num_computed_tokens)
        ]
        if problems:
            raise EngineError(f"scheduler: {'; '.join(problems[:8])}")

    # ---- entering and leaving -----------------------------------------------

    def _enter(self, request: Request, status: RequestStatus) -> None:
        """Make the request live."""
        check_fits(request, self.config.max_model_len, self.config.block_size, self.pool.num_blocks)
        if status is RequestStatus.WAITING and self._queues.num_queued >= self.config.max_num_waiting:
            raise QueueFull(f"{self._queues.num_queued} requests wait, which is the limit")
        self._queues.enter(request, status)
        extend_block_hashes(request, self.config)

    def _end(self, request: Request, reason: FinishReason) -> None:
        """Make it live no more; what it held must be free, or its caller's."""
        request.finish_reason = reason
        self.stats.num_finished[reason] += 1
        self._queues.move(request, RequestStatus.FINISHED)
        self._admission.note_change()

    def _free_blocks(self, request: Request) -> None:
        """Free a running request's blocks; those that the step in progress writes to when it ends."""
        in_flight = self._in_flight.sequences if self._in_flight is not None else ()
        if any(sequence.request is request for sequence in in_flight):
            self._dying.append(request.block_table)
        else:
            self.pool.release(request.block_table)
        request.block_table = []

    def _preempt(self, request: Request, step: BatchBuilder) -> None:
        self._free_blocks(request)
        self._queues.move(request, RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        if request.guesses is not None:
            request.guesses.lose_blocks()
        self.stats.num_preemptions += 1
        step.preempted.append(request)

    # ---- one step -------------------------------------------------------------

    def _schedule_decodes(self, step: BatchBuilder) -> None:
        for entry in list(self._queues.running):
            request = entry.request
            if request.num_tokens - request.num_computed_tokens != 1 or request.status is not RequestStatus.RUNNING:
                continue
            num_missing = self.config.num_blocks_for(request.num_tokens) - len(request.block_table)
            # The last in the order goes first. As `entry` walks in that order, nobody who is in the step is preempted.
            while 0 < num_missing > self.pool.num_free and request.status is RequestStatus.RUNNING:
                self._preempt(self._queues.running[-1].request, step)
            if request.status is RequestStatus.RUNNING:
                if num_missing > 0:
                    new_block_ids = self.pool.allocate(num_missing)
                    request.block_table += new_block_ids
                    step.new_block_ids += new_block_ids
                step.add(request, 1)

    def _schedule_started_prompts(self, step: BatchBuilder) -> None:
        for entry in self._queues.running:
            if step.budget == 0:
                return
            if entry.request.num_tokens - entry.request.num_computed_tokens > 1:
                step.add_chunk(entry.request, step.room(entry.request, entry.request.num_computed_tokens))

    # ---- booking a step's results -----------------------------------------------

    def _book_sequence(self, sequence: ScheduledSequence, result: SampledSequence) -> RequestUpdate:
        request = sequence.request
        if result.failure is not None:
            # What these logits came from is not worth keeping.
            return replace(self._finish(sequence, FinishReason.ERROR, ()), failure=result.failure)
        request.num_computed_tokens = sequence.start + sequence.num_known
        if sequence.num_known > 1 or sequence.start < request.num_context_tokens:
            self.stats.num_prompt_tokens += sequence.num_known
        if sequence.num_prompt_logprobs is not None:
            request.prompt_logprobs += result.prompt_logprobs
        publish_full_blocks(self.pool, request, self.config)
        if not sequence.needs_sample:
            return self._update_with(request, sequence, ())
        assert result.tokens, f"{request.request_id}: the runner returned no token"
        if request.guesses is not None:
            request.guesses.came([token.token_id for token in result.tokens], len(sequence.draft))
        update = self._book_tokens(sequence, result.tokens)
        num_told = len(update.new_tokens)
        self.stats.num_generated_tokens += num_told
        if sequence.draft:
            self.stats.num_drafts += 1
            self.stats.num_draft_tokens += len(sequence.draft)
            self.stats.num_accepted_tokens += min(num_told, len(result.tokens) - 1)
        return update

    def _book_tokens(self, sequence: ScheduledSequence, tokens: Sequence[SampledToken]) -> RequestUpdate:
        """Book what was sampled, each as if alone in its step: none after the one that ends the output."""
        request = sequence.request
        for num_told, token in enumerate(tokens, start=1):
            if num_told > 1:  # the guess before it came true
                request.num_computed_tokens += 1
                publish_full_blocks(self.pool, request, self.config)
            request.append_output(token.token_id)
            finish_reason = request.stop_reason(self.config.eos_token_ids, self.config.max_model_len)
            if finish_reason is not None:
                return self._finish(sequence, finish_reason, tokens[:num_told])
        if sequence.draft:
            free_wrong_guesses(request, self.pool, self.config)
        return self._update_with(request, sequence, tokens)

    def _finish(
        self, sequence: ScheduledSequence, reason: FinishReason, tokens: Sequence[SampledToken]
    ) -> RequestUpdate:
        request = sequence.request
        if request.hold_blocks and tokens:
            self.loans.pass_over(request.block_table)
        else:
            self._free_blocks(request)
        self._end(request, reason)
        return self._update_with(request, sequence, tokens)

    @staticmethod
    def _update_with(request: Request, sequence: ScheduledSequence, tokens: Sequence[SampledToken]) -> RequestUpdate:
        reports_prompt = sequence.num_prompt_logprobs is not None and bool(tokens)
        return RequestUpdate(
            request=request,
            num_computed_tokens=request.num_computed_tokens,
            new_tokens=tuple(tokens),
            finish_reason=request.finish_reason,
            stop_token_id=request.stop_token_id,
            prompt_logprobs=tuple(request.prompt_logprobs) if reports_prompt else None,
            num_output_tokens=len(request.output_token_ids),
            num_cached_tokens=request.num_cached_tokens,
            num_preemptions=request.num_preemptions,
        )
