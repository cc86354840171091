"""Leads a request through the workers: chooses, submits, and tries another while nothing is lost by it.

One HTTP request becomes one or more sequences (prompts times n); each is an order of its own, and all of them report
to one `Dispatch`, which one consumer drains. Sequences begin as the request's room grants it, a breath between two.
What arrives while the consumer is busy piles up here, at most the sequences' max_tokens, and is taken in one piece.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.v1 import worker_pb2 as pb

from services.router.admission import Room
from services.router.errors import ApiError, is_retryable, overloaded, unavailable
from services.router.fleet.placement import Ask, Placement, Placer
from services.router.fleet.session import SessionDown, SessionFull, WorkerSession
from services.router.fleet.workers import Workers
from services.router.metrics import RouterMetrics
from services.router.routing import Refusal

log = logging.getLogger(__name__)


class Arrival(NamedTuple):
    """Something that happened to a sequence: tokens, and at its first, its last and with log probabilities the
    output that they came with. Neither: it starts afresh, forget what came before."""

    sequence_index: int
    token_ids: list[int]
    output: pb.Output | None = None


@dataclass(frozen=True)
class ServedBy:
    """The place of a sequence, and the number of decode workers it was given to."""

    placement: Placement
    num_attempts: int
    routed_unix_s: float
    """When it was first sent."""


@dataclass
class _Sequence:
    """One order and where it runs now. Its session delivers to it."""

    dispatch: Dispatch
    ask: Ask
    session: WorkerSession | None = None
    handle: int = 0
    placement: Placement | None = None
    awaits_prefill: bool = False
    tried: list[str] = field(default_factory=list)
    routed_unix_s: float = 0.0
    due_s: float | None = None
    """When its first token is reckoned to come, by the monotonic clock; None once it has."""
    num_tokens: int = 0
    was_full: bool = False
    """The last worker had no room for the order itself."""
    ended: bool = False

    @property
    def index(self) -> int:
        return self.ask.index

    def deliver(self, output: pb.Output) -> None:
        try:
            self.dispatch._on_output(self, output)
        except Exception:
            # It ends this sequence, not the session and all that runs on it.
            log.exception("an output could not be taken", extra={"request_id": self.ask.order.request_id})
            self.dispatch._break_off(self)

    def deliver_token(self, token_id: int) -> None:
        self.num_tokens += 1
        self.dispatch._arrive(Arrival(self.index, [token_id]))


class Dispatch:
    """The sequences of one HTTP request. Owned by the task that serves it, which must `close` it."""

    def __init__(
        self,
        workers: Workers,
        placer: Placer,
        metrics: RouterMetrics,
        room: Room,
        make_ask: Callable[[int], Ask],
        *,
        max_attempts: int,
        restartable: bool,
    ) -> None:
        """`make_ask`: what the sequence of that index asks for, called when it begins; its order lacks handle, prefill
        targets and prefix sources. `restartable`: a sequence may start afresh after tokens were seen (nothing of it has
        reached the client)."""
        self._workers = workers
        self._placer = placer
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._restartable = restartable
        self._arrivals: list[Arrival] = []
        self._waiter: asyncio.Future[bool] | None = None
        self._make_ask = make_ask
        self._room = room
        room.on_grant = self._wake
        self._sequences: list[_Sequence] = []  # those that have begun, by index

    async def arrivals(self, idle_s: float | None = None) -> list[Arrival]:
        """Wait for arrivals, at most `idle_s`, and return all in order; begin what there is room for.

        One caller at a time. Raises ApiError when there is no worker for a sequence; then close it.
        """
        while True:
            if self._room.refusal is not None:
                raise self._room.refusal
            while self._room.num_free:
                session = self._begin()
                await asyncio.sleep(0)  # others are served between two
                await session.drained()
            if self._arrivals:
                break
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(idle_s, self._wake, False) if idle_s is not None else None
            try:
                if not await self._waiter:
                    return []
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        arrived, self._arrivals = self._arrivals, []
        return arrived

    def served_by(self, index: int) -> ServedBy | None:
        """Returns who serves, or has served, a sequence; None before it was submitted."""
        sequence = self._sequences[index] if index < len(self._sequences) else None
        if sequence is None or sequence.placement is None:
            return None
        return ServedBy(sequence.placement, len(sequence.tried), sequence.routed_unix_s)

    def abort(self, index: int, reason: str) -> None:
        """Ends one sequence at its worker, if it still runs."""
        sequence = self._sequences[index]
        if not sequence.ended:
            self._leave(sequence, reason)
            self._end(sequence)

    def close(self, reason: str = "the request has ended") -> None:
        """Ends what still runs. Safe to call again."""
        for sequence in self._sequences:
            self.abort(sequence.index, reason)

    # ---- one sequence ---------------------------------------------------------

    def _begin(self) -> WorkerSession:
        sequence = _Sequence(self, self._make_ask(len(self._sequences)))
        self._sequences.append(sequence)
        refusal = self._submit(sequence)
        sequence.due_s = self._room.begin()
        if refusal is not None:
            raise self._refused(refusal, sequence)
        assert sequence.session is not None
        sequence.routed_unix_s = time.time()
        return sequence.session

    def _end(self, sequence: _Sequence) -> None:
        if not sequence.ended:
            sequence.ended = True
            self._room.end()

    def _submit(self, sequence: _Sequence, retried_after: str = "") -> Refusal | None:
        request_id = sequence.ask.order.request_id
        while True:
            attempt = len(sequence.tried) + 1
            placement = self._placer.place(sequence.ask, sequence.tried, attempt=attempt, retried_after=retried_after)
            if isinstance(placement, Refusal):
                return placement
            sequence.tried.append(placement.decision.decode.worker_id)
            try:
                self._send(sequence, placement)
            except (SessionDown, SessionFull) as error:
                log.info("%s", error, extra={"request_id": request_id})
                sequence.was_full = isinstance(error, SessionFull)
                retried_after = "session full" if sequence.was_full else "session down"
                continue
            decision = placement.decision
            self._metrics.count_decision(decision.policy.value, decision.cause, decision.prefills_locally)
            log.debug("%s", decision.reason, extra={"request_id": request_id})
            return None

    def _send(self, sequence: _Sequence, placement: Placement) -> None:
        message = pb.SessionRequest(generate=sequence.ask.order)  # a copy: the next attempt needs the bare order
        self._placer.fill_order(message.generate, placement)
        session = self._workers.session(*placement.decode_key)
        sequence.handle = session.submit(message, sequence)
        sequence.session = session
        sequence.placement = placement
        sequence.awaits_prefill = True
        self._placer.sent(placement)

    def _on_output(self, sequence: _Sequence, output: pb.Output) -> None:
        if output.token_ids or output.finish_reason:
            self._settle_prefill(sequence, output)
        if output.finish_reason:
            if output.finish_reason == pb.FINISH_REASON_ABORT:
                # Not by us: ours are no longer delivered. The worker gave the request up, so another may take it.
                output.finish_reason = pb.FINISH_REASON_ERROR
                output.error.code = pb.ERROR_CODE_UNAVAILABLE
                output.error.message = "the decode worker aborted the request"
            self._leave(sequence, "")
            if output.finish_reason == pb.FINISH_REASON_ERROR and self._retry(sequence, output.error):
                return
            self._end(sequence)
            if output.error.code == pb.ERROR_CODE_OVERLOADED:
                self._metrics.count_refusal("workers_full")
        sequence.num_tokens += len(output.token_ids)
        self._arrive(Arrival(sequence.index, list(output.token_ids), output))

    def _break_off(self, sequence: _Sequence) -> None:
        self._end(sequence)
        error = pb.Error(code=pb.ERROR_CODE_INTERNAL, message="the router failed to take an output")
        output = pb.Output(handle=sequence.handle, finish_reason=pb.FINISH_REASON_ERROR, error=error)
        self._arrive(Arrival(sequence.index, list(output.token_ids), output))
        self._leave(sequence, "the router failed")

    def _retry(self, sequence: _Sequence, error: pb.Error) -> bool:
        if not is_retryable(error) or len(sequence.tried) >= self._max_attempts:
            return False
        if sequence.num_tokens and not self._restartable:
            return False
        if self._submit(sequence, pb.ErrorCode.Name(error.code)) is not None:
            return False
        extra = {"request_id": sequence.ask.order.request_id}
        log.info("tried on another worker: %s", error.message, extra=extra)
        self._metrics.retries.inc()
        if sequence.num_tokens:
            sequence.num_tokens = 0
            self._arrive(Arrival(sequence.index, []))
        return True

    def _leave(self, sequence: _Sequence, reason: str) -> None:
        session, sequence.session = sequence.session, None
        self._settle_prefill(sequence)
        if session is not None:
            session.abort(sequence.handle, reason)
            self._workers.retire_if_idle(session)

    def _settle_prefill(self, sequence: _Sequence, output: pb.Output | None = None) -> None:
        """The prefill has ended: by a token in `output`, or because the sequence has."""
        placement = sequence.placement
        if placement is None or not sequence.awaits_prefill:
            return
        sequence.awaits_prefill = False
        if output is not None and output.token_ids:
            if sequence.due_s is not None:
                self._room.first_token(sequence.due_s, time.monotonic())
                sequence.due_s = None
            self._placer.prefilled(placement, output.usage if output.HasField("usage") else None)
        else:
            self._placer.withdraw(placement)

    def _refused(self, refusal: Refusal, sequence: _Sequence) -> ApiError:
        model = sequence.ask.order.model
        if sequence.was_full:
            self._metrics.count_refusal("workers_full")
            return overloaded(f"Model `{model}`: the workers do not take orders fast enough. Try again later.")
        self._metrics.count_refusal(refusal.value)
        words = {
            Refusal.NO_WORKER: "no decode worker is registered",
            Refusal.NOT_CONNECTED: "no decode worker can be reached",
            Refusal.DRAINING: "every decode worker is shutting down",
            Refusal.ALL_TRIED: "every decode worker was tried",
        }
        return unavailable(f"Model `{model}`: {words[refusal]}. Try again later.")

    def _arrive(self, arrival: Arrival) -> None:
        self._room.generated(len(arrival.token_ids))
        self._arrivals.append(arrival)
        self._wake()

    def _wake(self, has_news: bool = True) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(has_news)
