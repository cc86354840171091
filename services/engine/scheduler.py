"""Continuous batching: decides what each step computes, and which request holds which block.

Pure: no clock, no tensors, no threads. A step is `schedule` (takes blocks, returns a Batch), then the runner, then
`update` (books the result, publishes full blocks, frees finished requests). The rules, in order:

1.  One order for everything: (priority, arrival, order of coming). Smaller is sooner.
2.  Running requests that decode get one token each. Where a block is missing, the running request that comes last in
    the order is preempted: it gives back all its blocks, returns to the queue and later computes its tokens again.
3.  Then prompts, in chunks, while the token budget lasts: those that run already, then the queue. A prompt takes the
    blocks for all its tokens when it enters, so a started prompt never waits for memory. One whose next block a running
    prompt is computing waits for that block instead of computing it again; others pass it.
4.  Who enters leaves one free block for each request that runs (it will want it within block_size steps), or there
    would be a preemption right away. With nothing running, it may take everything: progress is certain.
5.  Reservations (blocks to read a prompt into that another worker computes) enter by the same order and the same
    rule, at any moment and without token budget. Neither they nor the queue pass an earlier one of the other kind that
    waits for memory or a place.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvstore.block_hash import BlockHash
from kvstore.block_pool import BlockPool
from services.engine.batch import Batch, BatchBuilder, BlockCopy, SampledBatch, SampledSequence, ScheduledSequence
from services.engine.block_tables import (
    TakenBlocks,
    extend_block_hashes,
    match_next_block,
    publish_full_blocks,
    take_blocks,
)
from services.engine.limits import SchedulerConfig, check_fits
from services.engine.loans import Loans
from services.engine.request import (
    EngineError,
    FinishReason,
    InvalidRequest,
    QueueFull,
    Request,
    RequestStatus,
    RequestUpdate,
    SampledToken,
)
from services.engine.stats import SchedulerStats


class NotReserved(EngineError):
    """A request was to join the running ones that has no place among them: it was aborted, or never granted one."""


@dataclass(frozen=True)
class GrantedReservation:
    """Blocks for a request's whole prompt, lent to the caller; the first `num_present` hold their content already."""

    request: Request
    block_ids: list[int]
    num_present: int


@dataclass(order=True)
class _Entry:
    """A request's place in the one order."""

    priority: int
    arrival_s: float
    number: int  # order of coming; kept over preemptions
    request: Request = field(compare=False)


class Scheduler:
    """Owns the queues and, with the pool, every block reference that is not lent to a caller. One thread only."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.loans = Loans(pool)
        self.stats = SchedulerStats()
        self._entries: dict[str, _Entry] = {}  # every live request, by id
        self._waiting: list[_Entry] = []  # WAITING and PREEMPTED, sorted
        self._reserving: list[_Entry] = []  # sorted
        self._running: list[_Entry] = []  # sorted
        self._reserved: dict[str, _Entry] = {}
        self._num_arrivals = 0
        self._in_flight: Batch | None = None
        self._dying: list[list[int]] = []  # block tables of requests aborted in mid-step; freed by `update`
        self._copied_from: list[int] = []  # blocks that the step in progress copies from; freed by `update`
        # Found by the last schedule: the queue's head waits for blocks or a place, not for budget. So no later
        # reservation may take what becomes free before the next schedule has looked again.
        self._queue_is_stuck = False
        self._something_changed = True  # since that schedule

    # ---- what the outside asks ----------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `schedule` can be expected to return a batch."""
        return bool(self._running) or (bool(self._waiting) and (self._something_changed or not self._queue_is_stuck))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without a place: waiting, preempted, or waiting for blocks or bytes of a transfer."""
        return len(self._waiting) + len(self._reserving) + len(self._reserved)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens (and tokens to compute again) that are not computed yet, here."""
        remaining = [e.request.num_tokens - e.request.num_computed_tokens for e in (*self._waiting, *self._running)]
        return sum(num_tokens for num_tokens in remaining if num_tokens > 1)  # 1: a decode row

    def add(self, request: Request) -> None:
        """Queue a request to be computed here. Raises `InvalidRequest` or `QueueFull`, changing nothing."""
        insort(self._waiting, self._enter(request, RequestStatus.WAITING))
        self._something_changed = True

    def reserve(self, request: Request) -> None:
        """Queue a request for blocks to read its prompt into; `grant_reservations` returns them. Errors as `add`."""
        insort(self._reserving, self._enter(request, RequestStatus.RESERVING))

    def cancel_reservation(self, request: Request) -> bool:
        """Stop waiting for blocks; the request is NEW again. False, changing nothing, where it does not wait for any:
        blocks that were granted already are given back by `release_reservation`.
        """
        if request.status is not RequestStatus.RESERVING:
            return False
        self._leave_reservation(request)
        request.move_to(RequestStatus.NEW)
        return True

    def release_reservation(self, request: Request, block_ids: Sequence[int]) -> None:
        """Give back a granted reservation that came to nothing: its blocks, and its place if it has one still.

        The request, unless it was aborted, is NEW again. Raises `NotLent` as `release_lent`.
        """
        self.release_lent(block_ids)
        if request.status is RequestStatus.RESERVED:
            self._leave_reservation(request)
            request.move_to(RequestStatus.NEW)

    def abort(self, request_id: str) -> bool:
        """End a live request, whatever its status, and free what it holds. Returns whether there was one.

        Blocks that are lent (a granted reservation's) are the caller's to release. Blocks that the step in progress
        writes to are freed when it ends.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        request = entry.request
        if request.status in (RequestStatus.RESERVING, RequestStatus.RESERVED):
            self._leave_reservation(request)
        elif request.status is RequestStatus.RUNNING:
            self._leave_running(entry)
            del self._entries[request_id]
        else:
            self._waiting.remove(entry)
            del self._entries[request_id]
        request.finish_reason = FinishReason.ABORT
        self._finished(request)
        return True

    def release_lent(self, block_ids: Sequence[int]) -> None:
        """Take back references that were lent. Raises `NotLent`, changing nothing, for one that was not."""
        self.loans.release(block_ids)
        self._something_changed = True

    def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Lend the longest cached prefix of `hashes` to the caller: one reference on each block; may be none."""
        block_ids = self.pool.match_prefix(hashes)
        self.loans.pass_over(block_ids)
        return block_ids

    def take_prefix(self, hashes: Sequence[BlockHash]) -> TakenBlocks | None:
        """Lend the caller a block per hash: the cached ones, and new ones to bring the others' content into.

        None, taking nothing, where the running requests need the room. `publish_lent` makes filled ones findable.
        """
        blocks = take_blocks(self.pool, hashes, len(hashes), headroom=len(self._running) + len(self._reserved))
        if blocks is not None:
            self.loans.pass_over(blocks.block_ids)
        return blocks

    def publish_lent(
        self, block_ids: Sequence[int], hashes: Sequence[BlockHash], parent_hash: BlockHash | None = None
    ) -> None:
        """Make lent blocks findable that the caller filled and verified: a run of a chain. Raises `NotLent`.

        `parent_hash` is that of the block before them; None where they begin at the head of the chain.
        """
        self.loans.check(block_ids)
        for block_id, block_hash in zip(block_ids, hashes, strict=True):
            self.pool.publish(block_id, block_hash, parent_hash)
            parent_hash = block_hash

    def next_prefixes(self, max_requests: int) -> list[Sequence[BlockHash]]:
        """Identities of the full blocks of those who wait, in order, for whoever can bring some of them back.

        The first one's, and those of who could begin with it: what comes back for one must not cost another's. None
        where there is no place for them, or in mid-step. Requests that use no cached blocks are left out.
        """
        if self._in_flight is not None or len(self._running) + len(self._reserved) >= self.config.max_rows:
            return []
        entries = sorted([*self._waiting[:max_requests], *self._reserving[:max_requests]])[:max_requests]
        room = self.pool.num_free - len(self._running) - len(self._reserved)
        prefixes: list[Sequence[BlockHash]] = []
        for index, entry in enumerate(entries):
            room -= self.config.num_blocks_for(entry.request.num_tokens) + 1
            if index > 0 and room < 0:
                break
            if not entry.request.wants_prompt_logprobs:
                prefixes.append(entry.request.block_hashes)
        return prefixes

    def grant_reservations(self) -> list[GrantedReservation]:
        """Give blocks to the reservations whose turn it is. Between steps only: in mid-step it grants nothing."""
        granted: list[GrantedReservation] = []
        while self._reserving and self._in_flight is None:
            entry = self._reserving[0]
            if self._queue_is_stuck and self._waiting and self._waiting[0] < entry:
                break
            blocks = self._take_blocks(entry.request, entry.request.block_hashes)
            if blocks is None:
                break
            del self._reserving[0]
            entry.request.move_to(RequestStatus.RESERVED)
            self._reserved[entry.request.request_id] = entry
            self.loans.pass_over(blocks.block_ids)
            self._something_changed = True
            granted.append(GrantedReservation(entry.request, blocks.block_ids, blocks.num_present))
        return granted

    def add_prefilled(self, request: Request, block_ids: Sequence[int], first_token: SampledToken) -> RequestUpdate:
        """Run a request on from its first token: its prompt's KV is in `block_ids`, verified, in order.

        The request must be RESERVED; `block_ids` are the lent blocks of its reservation and become the request's.
        Raises `NotReserved` or `NotLent`, changing nothing, otherwise. The update says whether the first token was also
        the last.
        """
        entry = self._reserved.get(request.request_id)
        num_needed = self.config.num_blocks_for(request.num_prompt_tokens)
        if entry is None or entry.request is not request or len(block_ids) != num_needed:
            raise NotReserved(
                f"request {request.request_id} is {request.status.name} and comes with {len(block_ids)} blocks; "
                f"it must be RESERVED and needs {num_needed}"
            )
        self.loans.take_over(block_ids)
        request.move_to(RequestStatus.RUNNING)
        del self._reserved[request.request_id]
        request.block_table = list(block_ids)
        request.was_scheduled = True
        request.num_computed_tokens = request.num_prompt_tokens
        insort(self._running, entry)
        publish_full_blocks(self.pool, request, self.config)
        return self._book_token(entry, ScheduledSequence(request, 0, 0, False, True, None), first_token)

    def schedule(self) -> Batch | None:
        """Choose the next step's work and take its blocks; None where nothing can run. `update` must follow."""
        assert self._in_flight is None, "schedule was called twice without update"
        step = BatchBuilder(self.config.max_num_batched_tokens, self.config.max_prompt_logprob_rows)
        self._schedule_decodes(step)
        self._schedule_started_prompts(step)
        self._schedule_queue(step)
        if not step.sequences:
            assert not self._running or step.preempted, "requests run and none could be scheduled"
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
        self.pool.release(self._copied_from)
        self._copied_from.clear()
        self.stats.num_steps += 1
        return [
            self._book_sequence(self._entries[sequence.request.request_id], sequence, result)
            for sequence, result in zip(batch.sequences, sampled.sequences, strict=True)
            if sequence.request.status is RequestStatus.RUNNING
        ]

    def check_integrity(self) -> None:
        """Raise unless every request is in one place that fits its status, and every reference has a holder."""
        held = self.loans.references()
        for block_table in self._dying:
            held.update(block_table)
        for entry in self._running:
            held.update(entry.request.block_table)
        held.update(self._copied_from)
        self.pool.check_integrity(held)
        places = [
            (self._waiting, (RequestStatus.WAITING, RequestStatus.PREEMPTED)),
            (self._reserving, (RequestStatus.RESERVING,)),
            (self._running, (RequestStatus.RUNNING,)),
            (list(self._reserved.values()), (RequestStatus.RESERVED,)),
        ]
        problems = [
            f"{entry.request.request_id} is {entry.request.status.name} where {statuses[0].name} requests are kept"
            for entries, statuses in places
            for entry in entries
            if entry.request.status not in statuses
        ]
        problems += [
            f"{entry.request.request_id} has {len(entry.request.block_table)} blocks for "
            f"{entry.request.num_computed_tokens} computed tokens"
            for entry in self._running
            if len(entry.request.block_table) < self.config.num_blocks_for(entry.request.num_computed_tokens)
        ]
        if sum(len(entries) for entries, _ in places) != len(self._entries):
            problems.append(f"{len(self._entries)} live requests, {[len(entries) for entries, _ in places]} in places")
        if problems:
            raise EngineError(f"scheduler: {'; '.join(problems[:8])}")

    # ---- entering and leaving -----------------------------------------------

    def _enter(self, request: Request, status: RequestStatus) -> _Entry:
        """Make the request live."""
        check_fits(request, self.config, self.pool.num_blocks)
        num_queued = len(self._waiting) + len(self._reserving)
        if num_queued >= self.config.max_num_waiting:
            raise QueueFull(f"{num_queued} requests wait, which is the limit")
        if request.request_id in self._entries:
            raise InvalidRequest("request_id", f"{request.request_id} is in use")
        extend_block_hashes(request, self.config)
        request.move_to(status)
        self._num_arrivals += 1
        entry = _Entry(request.priority, request.arrival_s, self._num_arrivals, request)
        self._entries[request.request_id] = entry
        return entry

    def _leave_reservation(self, request: Request) -> None:
        entry = self._entries.pop(request.request_id)
        if self._reserved.pop(request.request_id, None) is None:
            self._reserving.remove(entry)
        self._something_changed = True

    def _leave_running(self, entry: _Entry) -> None:
        """Take a request out of the running ones and free its blocks."""
        self._running.remove(entry)
        in_flight = self._in_flight.sequences if self._in_flight is not None else ()
        if any(sequence.request is entry.request for sequence in in_flight):
            self._dying.append(entry.request.block_table)
        else:
            self.pool.release(entry.request.block_table)
        entry.request.block_table = []

    def _finished(self, request: Request) -> None:
        assert request.finish_reason is not None
        self.stats.num_finished[request.finish_reason] += 1
        request.move_to(RequestStatus.FINISHED)
        self._something_changed = True

    def _preempt(self, entry: _Entry, step: BatchBuilder) -> None:
        self._leave_running(entry)
        entry.request.move_to(RequestStatus.PREEMPTED)
        entry.request.num_computed_tokens = 0
        entry.request.num_preemptions += 1
        self.stats.num_preemptions += 1
        insort(self._waiting, entry)
        step.preempted.append(entry.request)

    # ---- one step -------------------------------------------------------------

    def _schedule_decodes(self, step: BatchBuilder) -> None:
        for entry in list(self._running):
            request = entry.request
            if request.num_tokens - request.num_computed_tokens != 1 or request.status is not RequestStatus.RUNNING:
                continue
            num_missing = self.config.num_blocks_for(request.num_tokens) - len(request.block_table)
            # The last in the order goes first. As `entry` walks in that order, nobody who is in the step is preempted.
            while num_missing > self.pool.num_free and request.status is RequestStatus.RUNNING:
                self._preempt(self._running[-1], step)
            if request.status is RequestStatus.RUNNING:
                new_block_ids = self.pool.allocate(num_missing)
                request.block_table += new_block_ids
                step.new_block_ids += new_block_ids
                step.add(request, 1)

    def _schedule_started_prompts(self, step: BatchBuilder) -> None:
        for entry in self._running:
            if step.budget == 0:
                return
            if entry.request.num_tokens - entry.request.num_computed_tokens > 1:
                self._add_chunk(entry.request, step)

    def _schedule_queue(self, step: BatchBuilder) -> None:
        self._queue_is_stuck = self._something_changed = False
        being_computed = self._hashes_being_computed() if self._waiting else set()
        for entry in list(self._waiting):
            if step.budget == 0:
                return
            if self._follows(entry.request, being_computed):
                continue
            if (self._reserving and self._reserving[0] < entry) or not self._start(entry.request, step):
                self._queue_is_stuck = True
                return
            self._waiting.remove(entry)
            insort(self._running, entry)
            being_computed.update(self._uncomputed_hashes(entry.request))
            if not self._add_chunk(entry.request, step):
                return

    def _hashes_being_computed(self) -> set[BlockHash]:
        """Identities of the blocks that running prompts are about to fill."""
        return {block_hash for entry in self._running for block_hash in self._uncomputed_hashes(entry.request)}

    def _uncomputed_hashes(self, request: Request) -> Sequence[BlockHash]:
        return request.block_hashes[request.num_computed_tokens // self.config.block_size :]

    def _follows(self, request: Request, being_computed: set[BlockHash]) -> bool:
        """Whether a running prompt is computing the very block that this one would compute first.

        It then waits for that block, and for those after it, instead of computing them a second time; others may pass
        it. The wait is bounded: the running prompt goes on in every step, and when it ends, however it ends, its blocks
        are either cached or no more being computed.
        """
        if request.wants_prompt_logprobs or not self.pool.enable_prefix_caching or not being_computed:
            return False
        num_cached = self.pool.peek_prefix(request.block_hashes)
        return num_cached < len(request.block_hashes) and request.block_hashes[num_cached] in being_computed

    def _start(self, request: Request, step: BatchBuilder) -> bool:
        """Give a queued request all the blocks that its tokens need; False, changing nothing, if it must wait."""
        # Cached blocks cannot tell a prompt's logprobs: those are computed from every position's logits.
        blocks = self._take_blocks(request, () if request.wants_prompt_logprobs else request.block_hashes)
        if blocks is None:
            return False
        request.block_table = blocks.block_ids
        num_cached_tokens = self._reuse(request, blocks.num_present, step)
        if not request.was_scheduled:
            request.num_cached_tokens = num_cached_tokens
            self.stats.num_prefix_queries += request.num_prompt_tokens
            self.stats.num_prefix_hits += num_cached_tokens
        request.num_computed_tokens = num_cached_tokens
        request.num_published_blocks = 0
        request.prompt_logprobs = [None] if request.wants_prompt_logprobs else []
        request.move_to(RequestStatus.RUNNING)
        return True

    def _reuse(self, request: Request, num_present: int, step: BatchBuilder) -> int:
        """Order the copies that spare computing, and the clearing of new blocks; returns how many tokens are reused.

        |-- num_present whole blocks --|-- copied --|-- computed: the last token at least, whose logits are wanted --|
        """
        block_table, block_size = request.block_table, self.config.block_size
        num_tokens = num_present * block_size
        if num_tokens == request.num_tokens:
            # All is there but the logits. The last token is computed again, in a block of the request's own.
            block_table[-1], source = self.pool.make_writable(block_table[-1])
            if source is not None:
                step.copies.append(BlockCopy(source, block_table[-1], block_size - 1))
            return num_tokens - 1
        # Looked for when the request has its blocks. That may have cost the coldest source its content, but no copy
        # stands in the way of an admission. The reference keeps the source as it is until the step has ended. However
        # few the tokens are, a copy is cheaper: 20 us for a block of 384 KiB, a hundredth of computing one token.
        shared = match_next_block(self.pool, request, num_present, self.config)
        if shared is None:
            step.new_block_ids += block_table[num_present:]
            return num_tokens
        self._copied_from.append(shared.block_id)
        step.copies.append(BlockCopy(shared.block_id, block_table[num_present], shared.num_tokens))
        step.new_block_ids += block_table[num_present + 1 :]
        if not request.was_scheduled:
            self.stats.num_partial_hit_tokens += shared.num_tokens
        return num_tokens + shared.num_tokens

    def _add_chunk(self, request: Request, step: BatchBuilder) -> bool:
        """Schedule what the budget allows of the request's uncomputed tokens; False if that is nothing."""
        num_tokens = min(request.num_tokens - request.num_computed_tokens, step.budget, self.config.max_chunk_tokens)
        if request.wants_prompt_logprobs:
            num_tokens = min(num_tokens, step.prompt_logprob_rows)
            step.prompt_logprob_rows -= num_tokens
        if num_tokens > 0:
            step.add(request, num_tokens)
        return num_tokens > 0

    def _take_blocks(self, request: Request, hashes: Sequence[BlockHash]) -> TakenBlocks | None:
        """A place in the batch and blocks for all tokens of the request; None, taking nothing, if it must wait."""
        num_others = len(self._running) + len(self._reserved)
        if num_others >= self.config.max_rows:
            return None
        num_blocks = self.config.num_blocks_for(request.num_tokens)
        return take_blocks(self.pool, hashes, num_blocks, headroom=num_others)

    # ---- booking a step's results -----------------------------------------------

    def _book_sequence(self, entry: _Entry, sequence: ScheduledSequence, result: SampledSequence) -> RequestUpdate:
        request = sequence.request
        if result.failure is not None:
            # What these logits came from is not worth keeping.
            return replace(self._finish(entry, sequence, FinishReason.ERROR, None), failure=result.failure)
        request.num_computed_tokens = sequence.end
        if sequence.num_tokens > 1 or sequence.start < request.num_prompt_tokens:
            self.stats.num_prompt_tokens += sequence.num_tokens
        if sequence.num_prompt_logprobs is not None:
            request.prompt_logprobs += result.prompt_logprobs
        publish_full_blocks(self.pool, request, self.config)
        if not sequence.needs_sample:
            return RequestUpdate(request, sequence.is_first, request.num_computed_tokens)
        assert result.token is not None, f"{request.request_id}: the runner returned no token"
        self.stats.num_generated_tokens += 1
        return self._book_token(entry, sequence, result.token)

    def _book_token(self, entry: _Entry, sequence: ScheduledSequence, token: SampledToken) -> RequestUpdate:
        request = entry.request
        request.append_output(token.token_id)
        finish_reason = request.stop_reason(self.config.eos_token_ids, self.config.max_model_len)
        if finish_reason is not None:
            return self._finish(entry, sequence, finish_reason, token)
        return self._update_with(request, sequence, token)

    def _finish(
        self, entry: _Entry, sequence: ScheduledSequence, reason: FinishReason, token: SampledToken | None
    ) -> RequestUpdate:
        request = entry.request
        del self._entries[request.request_id]
        if request.hold_blocks and token is not None:
            self._running.remove(entry)
            self.loans.pass_over(request.block_table)
        else:
            self._leave_running(entry)
        request.finish_reason = reason
        self._finished(request)
        return self._update_with(request, sequence, token)

    @staticmethod
    def _update_with(request: Request, sequence: ScheduledSequence, token: SampledToken | None) -> RequestUpdate:
        reports_prompt = sequence.num_prompt_logprobs is not None and token is not None
        return RequestUpdate(
            request=request,
            first_scheduled=sequence.is_first,
            num_computed_tokens=request.num_computed_tokens,
            new_tokens=() if token is None else (token,),
            finish_reason=request.finish_reason,
            stop_token_id=request.stop_token_id,
            prompt_logprobs=tuple(request.prompt_logprobs) if reports_prompt else None,
        )
