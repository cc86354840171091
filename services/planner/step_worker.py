"""A worker that takes every step: production's scheduler and block pool, with a step as long as the rates say."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from kvstore.block import BlockHash, Proof
from kvstore.pool import BlockPool
from services.budgets import Budgets
from services.engine.native.scheduling import Batch, Request, SampledBatch, SampledSequence, Scheduler, SchedulerConfig
from services.engine.request import FinishReason, RequestUpdate, SampledToken, SamplingParams
from services.planner.fleet import Limits
from services.planner.job import Job
from services.planner.virtual_time import VirtualTime
from services.planner.worker import Listener, Load
from services.planner.workload import FINGERPRINT
from services.rates import RateLearner, Rates, StepShape

_PROOF: Final = Proof(1)
_TOKEN_IDS: Final = 1 << 31
_MANY: Final = 1 << 30


class StepWorker:
    """One of them. What is asked of it happens between two steps, as on an engine's thread."""

    def __init__(self, row: int, time: VirtualTime, rates: Rates, limits: Limits, listener: Listener) -> None:
        self.row = row
        self.busy_s = 0.0
        self.num_steps = 0
        self.pool = BlockPool(limits.num_blocks)
        learner = RateLearner()
        learner.rates = rates  # as if it had learnt for long
        self.scheduler = Scheduler(_config(limits), self.pool, rates=learner)
        self.on_shape: Callable[[StepShape], None] = lambda shape: None
        """Called with each step's shape, when it begins."""
        self._time, self._rates, self._listener = time, rates, listener
        self._commands: deque[Callable[[], None]] = deque()
        self._is_in_turn = False
        self._jobs: dict[str, Job] = {}
        self._prompts: dict[str, Request] = {}  # of those that have no token yet
        self._requests: dict[int, Request] = {}  # of jobs whose blocks are held or reserved
        self._granted: dict[str, Callable[[list[int]], None]] = {}
        self._reserved: dict[int, list[int]] = {}

    # ---- what is asked -------------------------------------------------------

    def peek(self, hashes: Sequence[BlockHash]) -> int:
        return self.pool.peek_prefix(hashes)

    def compute(self, job: Job, hold: bool = False) -> None:
        self._order(partial(self._compute, job, hold))

    def give_up(self, job: Job, then: Callable[[], None]) -> None:
        self._order(partial(self._give_up, job, then))

    def reserve(self, job: Job, granted: Callable[[], None]) -> None:
        self._order(partial(self._reserve, job, granted))

    def cancel(self, job: Job) -> None:
        self._order(partial(self._cancel, job))

    def join(self, job: Job) -> None:
        self._order(partial(self._join, job))

    def release(self, job: Job) -> None:
        self._order(partial(self._release, job))

    def bring(self, hashes: Sequence[BlockHash], then: Callable[[], None]) -> None:
        self._order(partial(self._bring, hashes, then))

    def bend(self, budgets: Budgets) -> None:
        self.scheduler.prompt_budget.budgets = budgets

    def load(self) -> Load:
        scheduler = self.scheduler
        return Load(
            scheduler.num_running,
            scheduler.num_waiting,
            self.pool.num_free,
            self.pool.num_blocks,
            scheduler.num_waiting_tokens,
            scheduler.num_stream_tokens,
        )

    def check_integrity(self) -> None:
        """Raise unless every block has an owner and every request a place."""
        self.scheduler.check_integrity()

    # ---- between two steps -----------------------------------------------------

    def _order(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if not self._is_in_turn:
            self._turn()

    def _compute(self, job: Job, hold: bool) -> None:
        request = self._request(job, hold)
        self._jobs[request.request_id] = job
        self._prompts[request.request_id] = request
        if hold:
            self._requests[job.number] = request
        self.scheduler.add(request)

    def _give_up(self, job: Job, then: Callable[[], None]) -> None:
        request_id = next((each for each in (f"{job.number}", f"{job.number}/p") if each in self._prompts), None)
        if request_id is None:
            return
        request = self._prompts.pop(request_id)
        job.num_own_tokens += max(request.num_computed_tokens - request.num_cached_tokens, 0)
        self.scheduler.abort(request_id)
        del self._jobs[request_id]
        self._requests.pop(job.number, None)
        then()

    def _reserve(self, job: Job, granted: Callable[[], None]) -> None:
        request = self._requests[job.number] = self._request(job, False)

        def on_granted(block_ids: list[int]) -> None:
            self._reserved[job.number] = block_ids
            granted()

        self._granted[request.request_id] = on_granted
        self.scheduler.reserve(request)

    def _cancel(self, job: Job) -> None:
        request = self._requests.pop(job.number)
        if not self.scheduler.cancel_reservation(request):
            self.scheduler.release_reservation(request, self._reserved.pop(job.number))

    def _join(self, job: Job) -> None:
        request = self._requests.pop(job.number)
        self._jobs[request.request_id] = job
        block_ids = self._reserved.pop(job.number)
        update = self.scheduler.add_prefilled(request, block_ids, [_PROOF] * len(block_ids), _token(job))
        job.num_said, job.last_s = 1, self._time.now_s
        self._book(update, 0)

    def _release(self, job: Job) -> None:
        self.scheduler.release_lent(self._requests.pop(job.number).block_table)

    def _bring(self, hashes: Sequence[BlockHash], then: Callable[[], None]) -> None:
        taken = self.scheduler.take_prefix(hashes)
        if taken is not None:
            first = taken.num_present
            new, parent = taken.block_ids[first:], hashes[first - 1] if first else None
            self.scheduler.publish_lent(new, hashes[first:], [_PROOF] * len(new), parent)
            self.scheduler.release_lent(taken.block_ids)
        then()

    # ---- steps -------------------------------------------------------------------

    def _turn(self) -> None:
        """Do what was asked, and begin a step if there is work for one."""
        self._is_in_turn = True
        while True:
            while self._commands:
                self._commands.popleft()()
            batch = self.scheduler.schedule() if self.scheduler.has_work else None
            if batch is not None:
                self._begin(batch)
                return
            self._grant()
            if not self._commands:
                break
        self._is_in_turn = False

    def _begin(self, batch: Batch) -> None:
        shape = batch.shape
        self.on_shape(shape)
        for sequence in batch.sequences:
            if sequence.is_first and sequence.request.hold_blocks:
                self._listener.begun(self._jobs[sequence.request.request_id])
        seconds = self._rates.step_s(shape)
        self.busy_s += seconds
        self.num_steps += 1
        self._time.after(seconds, self._end, batch)

    def _end(self, batch: Batch) -> None:
        sampled = SampledBatch(
            tuple(
                SampledSequence((_token(self._jobs[each.request.request_id]),)) if each.needs_sample else _NOTHING
                for each in batch.sequences
            )
        )
        updates = self.scheduler.update(batch, sampled)
        self.pool.take_unproven()
        self._grant()
        for sequence, update in zip(batch.sequences, updates, strict=True):
            if update.new_tokens:
                self._book(update, sequence.num_tokens)
        self._listener.stepped(self.row)
        self._turn()

    def _grant(self) -> None:
        for request, room in self.scheduler.grant_reservations():
            self._granted.pop(request.request_id)(list(room.block_ids))

    def _book(self, update: RequestUpdate, num_tokens: int) -> None:
        """Book a request's newest token, and its end if it was the last one here."""
        request_id = update.request.request_id
        job, now_s = self._jobs[request_id], self._time.now_s
        if num_tokens:
            if job.num_said:
                self._listener.gaps(now_s - job.last_s, 1)
            job.num_said, job.last_s = job.num_said + 1, now_s
            if job.num_said == 1:
                del self._prompts[request_id]
                job.num_cached_tokens = max(update.num_cached_tokens - job.num_own_tokens, 0)
                self._listener.first(self.row, job, num_tokens)
        if update.finish_reason is not None:
            del self._jobs[request_id]
            if update.finish_reason is not FinishReason.HANDED_OFF and not update.request.hold_blocks:
                self._listener.ended(job)

    def _request(self, job: Job, hold: bool) -> Request:
        request = Request(
            request_id=f"{job.number}{'/p' if hold else ''}",
            prompt_token_ids=job.token_ids,
            sampling=SamplingParams(max_tokens=job.request.num_output_tokens, ignore_eos=True),
            arrival_s=self._time.now_s,
            hold_blocks=hold,
        )
        # Not as given ones, which the scheduler would hash again to see whether they are right.
        request.block_hashes = list(job.hashes)
        return request


_NOTHING: Final = SampledSequence()


def _token(job: Job) -> SampledToken:
    """Its next token: such that answers share nothing."""
    return SampledToken((job.number * 7919 + 13) % _TOKEN_IDS, None)


def _config(limits: Limits) -> SchedulerConfig:
    return SchedulerConfig(
        block_size=limits.block_size,
        max_model_len=limits.max_model_len,
        model_fingerprint=FINGERPRINT,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_waiting=_MANY,
    )
