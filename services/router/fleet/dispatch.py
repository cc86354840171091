"""Leads a request through the workers: chooses, submits, and goes on elsewhere where a worker is lost.

One HTTP request becomes one or more sequences (prompts times n); each is an order of its own (`sequence.py` has its
states), and all of them report to one `Dispatch`, which one consumer drains. Sequences begin as the request's room
grants it, a breath between two. What arrives while the consumer is busy piles up here, at most the sequences'
max_tokens, packed where it is more than a little.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tandem.v1 import worker_pb2 as pb

from services.router.admission import Room
from services.router.errors import is_retryable
from services.router.fleet.placed import Ask
from services.router.fleet.placement import Placer
from services.router.fleet.prefixes import PrefixFinder
from services.router.fleet.sequence import Arrival, Budget, Diverged, PackedArrival, Sequence, SequenceState, ServedBy
from services.router.fleet.session import WorkerSession
from services.router.fleet.submitting import Submitter
from services.router.fleet.workers import Workers
from services.router.metrics import RouterMetrics
from services.router.routing import is_alike

log = logging.getLogger(__name__)

T = TypeVar("T")

TakeAtOnce = Callable[[int, list[int]], bool]
"""Is called with a sequence's index and its token; whether it is done with them."""

_MAX_LOSSES = 16  # of one sequence's workers, dead or left
# Of arrivals that wait: so many are as they came, per sequence, and so many are taken at a time.
_FEW_PER_SEQUENCE, _MOST_TAKEN = 4, 1024


@dataclass(frozen=True)
class _Sink:
    """Takes what a session delivers for a sequence. What fails here ends that, not all that runs on the session."""

    dispatch: Dispatch
    sequence: Sequence

    def deliver(self, output: pb.Output) -> None:
        self._guarded(self.dispatch._on_output, output)

    def deliver_token(self, token_id: int, is_only: bool) -> None:
        self._guarded(self.dispatch._on_only_token if is_only else self.dispatch._on_token, token_id)

    def lose(self, reason: str, died: bool) -> None:
        self._guarded(self.dispatch._on_death if died else self.dispatch._on_standstill, reason)

    def may_leave(self) -> bool:
        return bool(self.dispatch._submitter.places_to_move_to(self.sequence))

    def _guarded(self, take: Callable[[Sequence, T], None], news: T) -> None:
        try:
            take(self.sequence, news)
        except Diverged as error:
            log.error("its worker began afresh, and differs: %s", error, extra={"request_id": self.sequence.request_id})
            self.dispatch._break_off(self.sequence, f"the answer cannot go on: {error}")
        except Exception:
            log.exception("an output could not be taken", extra={"request_id": self.sequence.request_id})
            self.dispatch._break_off(self.sequence, "the router failed to take an output")


class Dispatch:
    """The sequences of one HTTP request. Owned by the task that serves it, which must `close` it."""

    def __init__(
        self,
        workers: Workers,
        placer: Placer,
        prefixes: PrefixFinder,
        metrics: RouterMetrics,
        room: Room,
        make_ask: Callable[[int], Ask],
        budget: Budget,
        clock: Callable[[], float],
        unix_clock: Callable[[], float],
    ) -> None:
        """`make_ask`: what the sequence of that index asks for, called when it begins; its order lacks handle, prefill
        targets and prefix sources."""
        self._workers = workers
        self._placer = placer
        self._submitter = Submitter(workers, placer, prefixes, metrics, clock)
        self._metrics = metrics
        self._budget = budget
        self._clock = clock
        self._unix_clock = unix_clock
        self.at_once: TakeAtOnce | None = None
        """Is offered what comes while the consumer waits; what it does not take arrives as all else does."""
        self._arrivals: deque[Arrival | PackedArrival] = deque()
        self._waiter: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._make_ask = make_ask
        self._room = room
        room.on_grant = self._wake
        self._sequences: list[Sequence] = []  # those that have begun, by index
        self._searches: dict[int, asyncio.Task[None]] = {}  # of lost ones, by index

    async def arrivals(self, idle_s: float | None = None) -> list[Arrival]:
        """Wait for arrivals, at most `idle_s`, and return some in order; begin what there is room for.

        One caller at a time. Raises ApiError when there is no worker for a sequence; then close it.
        """
        while True:
            if self._room.refusal is not None:
                raise self._room.refusal
            while self._room.num_free:
                session = self._begin()
                if self._room.num_free:
                    await asyncio.sleep(0)  # others are served between two
                if session is not None:
                    await session.drained()
            if self._arrivals:
                break
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            self._timer = loop.call_later(idle_s, self._on_idle, idle_s) if idle_s is not None else None
            try:
                if not await self._waiter:
                    return []
            finally:
                self._waiter = None
                if self._timer is not None:
                    self._timer.cancel()
        taken = [self._arrivals.popleft() for _ in range(min(len(self._arrivals), _MOST_TAKEN))]
        return [each if isinstance(each, Arrival) else each.unpacked() for each in taken]

    def served_by(self, index: int) -> ServedBy | None:
        """Returns who serves, or has served, a sequence; None before it was submitted."""
        sequence = self._sequences[index] if index < len(self._sequences) else None
        if sequence is None or sequence.placement is None:
            return None
        resumes = tuple(sequence.resumes)
        return ServedBy(sequence.placement, sequence.num_attempts, sequence.routed_unix_s, resumes)

    def abort(self, index: int, reason: str) -> None:
        """Ends one sequence at its worker, if it still runs."""
        sequence = self._sequences[index]
        if not sequence.ended:
            self._leave(sequence, reason)
            self._end(sequence, "left")

    def close(self, reason: str = "the request has ended") -> None:
        """Ends what still runs, and lets go of whoever it calls, and is called by: no collection has to find it later,
        and hold up all streams meanwhile. Safe to call again."""
        for sequence in self._sequences:
            self.abort(sequence.index, reason)
        self.at_once = None
        self._room.on_grant = lambda: None

    # ---- placing a sequence -----------------------------------------------------

    def _begin(self) -> WorkerSession | None:
        """Begin the next sequence; None: it waits for a worker, as those before it have begun. Raises ApiError."""
        ask = self._make_ask(len(self._sequences))
        sequence = Sequence(ask)
        self._sequences.append(sequence)
        refusal = self._submitter.submit(sequence, ask, _Sink(self, sequence))
        sequence.due_s = self._room.begin()
        sequence.routed_unix_s = self._unix_clock()
        if ask.order.timeout_s > 0:
            sequence.ends_s = self._clock() + ask.order.timeout_s
        if refusal is not None:
            if sequence.index == 0:
                raise self._submitter.refused(refusal, sequence)
            error = pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message="no decode worker takes it")
            self._search(sequence, error, "refused", waits=True)
        return sequence.session

    # ---- what its worker says -----------------------------------------------------

    def _on_only_token(self, sequence: Sequence, token_id: int) -> None:
        self._on_token(sequence, token_id, self.at_once)

    def _on_token(self, sequence: Sequence, token_id: int, at_once: TakeAtOnce | None = None) -> None:
        was_resuming = sequence.state is SequenceState.RESUMING
        if sequence.add_token(token_id, self._clock()):
            if was_resuming:
                self._resumed(sequence)
            is_awaited = self._waiter is not None and not self._waiter.done()
            if at_once is not None and is_awaited and at_once(sequence.index, [token_id]):
                self._room.generated(1)
            else:
                self._arrive(Arrival(sequence.index, [token_id]))

    def _on_output(self, sequence: Sequence, output: pb.Output) -> None:
        if output.token_ids or output.finish_reason:
            self._settle_prefill(sequence, output)
        was = sequence.state
        sequence.take_output(output, self._clock())
        if was is SequenceState.DISPATCHING and sequence.state is SequenceState.STREAMING:
            self._begun(sequence)
        elif was is SequenceState.RESUMING and sequence.state is SequenceState.STREAMING:
            self._resumed(sequence)
        if output.finish_reason:
            if output.finish_reason == pb.FINISH_REASON_ABORT:
                # Not by us: ours are no longer delivered. The worker gave the request up, so another may take it.
                output.finish_reason = pb.FINISH_REASON_ERROR
                output.error.code = pb.ERROR_CODE_UNAVAILABLE
                output.error.message = "the decode worker aborted the request"
            left = sequence.session
            self._leave(sequence, "")
            if output.finish_reason == pb.FINISH_REASON_MOVED:
                self._move(sequence, output, left)
                return
            if output.finish_reason == pb.FINISH_REASON_LENGTH and sequence.outgrows_its_worker:
                self._go_on_behind(sequence, output, left)
                return
            if output.finish_reason == pb.FINISH_REASON_ERROR and self._goes_on(sequence, output.error):
                return
            if output.finish_reason == pb.FINISH_REASON_ERROR:
                self._fail(sequence, output.error, "refused")
                return
            self._end(sequence, "refused")
        if output.token_ids or output.prompt_logprobs or output.finish_reason:
            self._arrive(Arrival(sequence.index, list(output.token_ids), output))

    def _goes_on(self, sequence: Sequence, error: pb.Error) -> bool:
        """Whether another worker is looked for, since this one gave the sequence up. Once begun, it waits for room."""
        has_begun = bool(sequence.token_ids)
        if has_begun and error.code == pb.ERROR_CODE_INVALID:
            # Another one has taken the same, so the client is not to blame.
            error = pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message=error.message)
        if not is_retryable(error) or (not has_begun and len(sequence.tried) >= self._budget.max_attempts):
            return False
        self._search(sequence, error, "given_up", waits=has_begun or error.code == pb.ERROR_CODE_UNAVAILABLE)
        return True

    def _on_death(self, sequence: Sequence, reason: str) -> None:
        """Its worker is gone with it aboard, which may be why."""
        assert sequence.session is not None, f"{sequence.request_id} was lost by a worker that it was not at"
        sequence.deaths.append((sequence.session, sequence.session.num_streams))
        self._on_loss(sequence, reason, "lost")

    def _on_standstill(self, sequence: Sequence, reason: str) -> None:
        """Its worker was left, since it did not get on: it may be cut off, or starved."""
        self._on_loss(sequence, reason, "silent")

    def _on_loss(self, sequence: Sequence, reason: str, cause: str) -> None:
        assert sequence.placement is not None, f"{sequence.request_id} was lost by a worker that it was never given to"
        worker_id = sequence.placement.decision.decode.worker_id
        self._leave(sequence, "")
        sequence.num_losses += 1
        sequence.tried[:] = [worker_id]  # rather another one
        message = f"the session with decode worker {worker_id} was lost: {reason}"
        if sequence.num_deaths < self._budget.max_worker_deaths and sequence.num_losses < _MAX_LOSSES:
            error = pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message=message)
            self._search(sequence, error, cause, waits=True)
            return
        sequence.note_pause(cause)
        told = (
            f"{sequence.num_losses} decode workers were lost with this request aboard; it is given up. The last one: "
        )
        self._fail(sequence, pb.Error(code=pb.ERROR_CODE_INTERNAL, message=told + message), "worker_deaths")

    def _break_off(self, sequence: Sequence, why: str) -> None:
        self._leave(sequence, "the router cannot take it")
        self._fail(sequence, pb.Error(code=pb.ERROR_CODE_INTERNAL, message=why), "refused")

    def _fail(self, sequence: Sequence, error: pb.Error, outcome: str) -> None:
        if sequence.ended:
            return
        self._end(sequence, outcome)
        if error.code == pb.ERROR_CODE_OVERLOADED:
            self._metrics.count_refusal("workers_full")
        output = pb.Output(handle=sequence.handle, finish_reason=pb.FINISH_REASON_ERROR, error=error)
        self._arrive(Arrival(sequence.index, [], output))

    # ---- going on elsewhere -------------------------------------------------------

    def _move(self, sequence: Sequence, output: pb.Output, left: WorkerSession | None) -> None:
        """Its worker, which drains, has let it go as we asked."""
        assert left is not None, f"{sequence.request_id} left a worker that it was not at"
        sequence.tried.clear()
        if output.HasField("move"):
            sequence.move = output.move
            sequence.move.kv_address = left.record.kv_address
        message = f"decode worker {left.record.worker_id} drains"
        self._search(sequence, pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message=message), "moved", waits=True)

    def _go_on_behind(self, sequence: Sequence, output: pb.Output, left: WorkerSession | None) -> None:
        """Its worker's context has ended before the answer: it is shorter than those that were there when it began."""
        assert left is not None, f"{sequence.request_id} was cut short by a worker that it was not at"
        output.ClearField("finish_reason")
        if output.token_ids:
            self._arrive(Arrival(sequence.index, list(output.token_ids), output))
        message = (
            f"the context of decode worker {left.record.worker_id} ends at {left.record.max_model_len} tokens, where"
            f" prompt and answer may have {sequence.ask.num_final_tokens}, and none of a longer one has come"
        )
        self._search(sequence, pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message=message), "given_up", waits=True)

    def _search(self, sequence: Sequence, error: pb.Error, reason: str, *, waits: bool) -> None:
        """Look for another worker; without one the sequence ends with `error`."""
        sequence.note_pause(reason)
        sequence.move_to(SequenceState.LOST)
        sequence.due_s = None  # what comes now teaches nobody how long a first token takes
        search = self._find_another(sequence, error, waits, goes_back=reason in ("lost", "silent"))
        task = self._searches[sequence.index] = asyncio.create_task(search, name=f"resume-{sequence.request_id}")
        task.add_done_callback(lambda done: self._on_search_ended(sequence, done))

    async def _find_another(self, sequence: Sequence, error: pb.Error, waits: bool, goes_back: bool) -> None:
        """`goes_back`: to the worker that was lost, rather than to none."""
        began_s = self._clock()
        deadline_s = began_s + self._budget.resume_wait_s - sequence.searched_s
        ask = await self._submitter.longer_ask(sequence) if sequence.token_ids else sequence.ask
        sink, why = _Sink(self, sequence), pb.ErrorCode.Name(error.code)
        while self._submitter.submit(sequence, ask, sink, why) is not None:
            if not goes_back and not (waits and await self._workers.changed(deadline_s)):
                self._fail(sequence, error, "no_worker")
                return
            goes_back = False
            sequence.tried.clear()
        sequence.searched_s += self._clock() - began_s
        sequence.move_to(SequenceState.RESUMING if sequence.token_ids else SequenceState.DISPATCHING)
        log.info("goes on at another worker: %s", error.message, extra={"request_id": sequence.request_id})
        self._metrics.retries.inc()

    def _on_search_ended(self, sequence: Sequence, task: asyncio.Task[None]) -> None:
        if self._searches.get(sequence.index) is task:
            del self._searches[sequence.index]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the search for another worker failed", exc_info=error)
            self._break_off(sequence, "the router failed to find another worker")

    def _begun(self, sequence: Sequence) -> None:
        assert sequence.placement is not None, f"{sequence.request_id} was begun nowhere"
        sequence.numerics = sequence.placement.decision.decode.numerics
        sequence.made_by = self._workers.may_have_made(sequence.placement.space.model_fingerprint, sequence.usage)

    def _resumed(self, sequence: Sequence) -> None:
        resume, sequence.move = sequence.resumes[-1], None
        resume.pause_s = max(self._clock() - resume.since_s, 0.0)
        assert sequence.placement is not None, f"{sequence.request_id} goes on nowhere"
        decode = sequence.placement.decision.decode
        computed_by = {decode.numerics}
        if resume.usage is None or not resume.usage.HasField("moved"):  # else the KV came as it was
            sequence.made_by |= self._workers.may_have_made(sequence.placement.space.model_fingerprint, resume.usage)
            computed_by |= sequence.made_by
        resume.is_exact = decode.is_exact and is_alike(sequence.numerics, *computed_by)
        self._metrics.count_resume(resume)

    # ---- its end --------------------------------------------------------------------

    def _end(self, sequence: Sequence, outcome: str) -> None:
        """`outcome`: what becomes of a pause that had not ended."""
        if sequence.ended:
            return
        if sequence.resumes and sequence.resumes[-1].pause_s is None:
            self._metrics.count_resume(sequence.resumes[-1], outcome)
        sequence.move_to(SequenceState.ENDED)
        self._room.end()

    def _leave(self, sequence: Sequence, reason: str) -> None:
        search = self._searches.pop(sequence.index, None)
        if search is not None:
            search.cancel()
        session, sequence.session = sequence.session, None
        self._settle_prefill(sequence)
        if session is not None:
            session.abort(sequence.handle, reason)
            self._workers.retire_if_idle(session)

    def _settle_prefill(self, sequence: Sequence, output: pb.Output | None = None) -> None:
        """The prefill has ended: by a token in `output`, or because the sequence has."""
        placement = sequence.placement
        if placement is None or not sequence.awaits_prefill:
            return
        sequence.awaits_prefill = False
        if output is not None and output.token_ids:
            if sequence.due_s is not None:
                self._room.first_token(sequence.due_s, self._clock())
                sequence.due_s = None
            self._placer.prefilled(placement, output.usage if output.HasField("usage") else None)
        else:
            self._placer.withdraw(placement)

    def _arrive(self, arrival: Arrival) -> None:
        self._room.generated(len(arrival.token_ids))
        is_behind = arrival.output is not None and len(self._arrivals) >= _FEW_PER_SEQUENCE * len(self._sequences)
        self._arrivals.append(arrival.packed() if is_behind else arrival)
        self._wake()

    def _on_idle(self, idle_s: float) -> None:
        # Nobody is woken by what was taken at once.
        left_s = max(each.newest_token_s for each in self._sequences) + idle_s - self._clock() if self._sequences else 0
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._on_idle, idle_s)
        else:
            self._wake(False)

    def _wake(self, has_news: bool = True) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(has_news)
