"""A request's way through the workers: choose, submit, and try another worker while nothing is lost by it.

One HTTP request becomes one or more sequences (prompts times n); each is an order of its own, and all of them report
to one `Dispatch`, which one consumer drains. What arrives while the consumer is busy piles up here, at most the
sequences' max_tokens, and is taken in one piece.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.v1 import worker_pb2 as pb

from services.router.errors import ApiError, from_worker, internal, is_retryable, unavailable
from services.router.metrics import RouterMetrics
from services.router.routing import Decision, PrefillCandidate, Refusal, RoutedRequest, choose
from services.router.session import SessionDown, WorkerSession
from services.router.workers import Workers

log = logging.getLogger(__name__)

_KEY_TOKENS = 256


def routing_key(prompt_token_ids: Sequence[int], cache_salt: str) -> bytes:
    """Equal for prompts that begin equally; see `routing.choose`."""
    head = ",".join(map(str, prompt_token_ids[:_KEY_TOKENS]))
    return hashlib.blake2b(f"{cache_salt}\0{head}".encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Arrival:
    """Something that happened to sequence `index`. `output` None: it starts afresh, forget what came before."""

    index: int
    output: pb.Output | None


@dataclass
class _Sequence:
    """One order and where it runs now. Its session delivers to it."""

    dispatch: Dispatch
    index: int
    order: pb.GenerateRequest
    routed: RoutedRequest
    session: WorkerSession | None = None
    handle: int = 0
    target: PrefillCandidate | None = None
    tried: list[str] = field(default_factory=list)
    num_tokens: int = 0
    ended: bool = False

    def deliver(self, output: pb.Output) -> None:
        self.dispatch._on_output(self, output)


class Dispatch:
    """The sequences of one HTTP request. Owned by the task that serves it, which must `close` it."""

    def __init__(
        self,
        workers: Workers,
        metrics: RouterMetrics,
        orders: Sequence[pb.GenerateRequest],
        *,
        max_attempts: int,
        restartable: bool,
    ) -> None:
        """`orders` lack handle and prefill targets. `restartable`: a sequence may start afresh after tokens were seen
        (nothing of it has reached the client)."""
        self._workers = workers
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._restartable = restartable
        self._arrivals: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None
        self._sequences = [
            _Sequence(
                self,
                index,
                order,
                RoutedRequest(
                    order.model,
                    len(order.prompt_token_ids),
                    routing_key(order.prompt_token_ids, order.cache_salt),
                ),
            )
            for index, order in enumerate(orders)
        ]

    def start(self) -> None:
        """Submits every sequence. Raises ApiError when there is no worker for one; then close it."""
        for sequence in self._sequences:
            refusal = self._submit(sequence)
            if refusal is not None:
                self._metrics.count_refusal(refusal.value)
                raise _refused(refusal, sequence.routed.model)

    async def arrivals(self) -> list[Arrival]:
        """All that arrived since the last call, in order; waits for the first. One caller at a time."""
        while not self._arrivals:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        arrived, self._arrivals = self._arrivals, []
        return arrived

    def abort(self, index: int, reason: str) -> None:
        """Ends one sequence at its worker, if it still runs."""
        sequence = self._sequences[index]
        if not sequence.ended:
            sequence.ended = True
            self._leave(sequence, reason)

    def close(self, reason: str = "the request has ended") -> None:
        """Ends what still runs. Safe to call again."""
        for sequence in self._sequences:
            self.abort(sequence.index, reason)

    # ---- one sequence ---------------------------------------------------------

    def _submit(self, sequence: _Sequence) -> Refusal | None:
        while True:
            decision = choose(
                sequence.routed,
                self._workers.decode_candidates(),
                self._workers.prefill_candidates(),
                sequence.tried,
            )
            if isinstance(decision, Refusal):
                return decision
            sequence.tried.append(decision.decode.worker_id)
            try:
                self._send(sequence, decision)
            except SessionDown as error:
                log.info("request %s: %s", sequence.order.request_id, error)
                continue
            log.debug("request %s: %s", sequence.order.request_id, decision.reason)
            return None

    def _send(self, sequence: _Sequence, decision: Decision) -> None:
        order = pb.GenerateRequest()
        order.CopyFrom(sequence.order)
        for target in decision.prefill:
            order.prefill_targets.add(
                worker_id=target.worker_id,
                incarnation=target.incarnation,
                grpc_address=target.grpc_address,
                kv_address=target.kv_address,
            )
        session = self._workers.session(decision.decode.worker_id, decision.decode.incarnation)
        sequence.handle = session.submit(order, sequence)
        sequence.session = session
        if decision.prefill:
            sequence.target = decision.prefill[0]
            self._workers.count_prefill(sequence.target, sequence.routed.num_prompt_tokens)

    def _on_output(self, sequence: _Sequence, output: pb.Output) -> None:
        if output.token_ids or output.finish_reason:
            self._settle_prefill(sequence)
        if output.finish_reason:
            if output.finish_reason == pb.FINISH_REASON_ABORT:
                # Not by us: ours are no longer delivered. The worker gave the request up, so another may take it.
                output.finish_reason = pb.FINISH_REASON_ERROR
                output.error.code = pb.ERROR_CODE_UNAVAILABLE
                output.error.message = "the decode worker aborted the request"
            self._leave(sequence, "")
            if output.finish_reason == pb.FINISH_REASON_ERROR and self._retry(sequence, output.error):
                return
            sequence.ended = True
            if output.error.code == pb.ERROR_CODE_OVERLOADED:
                self._metrics.count_refusal("workers_full")
        sequence.num_tokens += len(output.token_ids)
        self._arrive(Arrival(sequence.index, output))

    def _retry(self, sequence: _Sequence, error: pb.Error) -> bool:
        if not is_retryable(error) or len(sequence.tried) >= self._max_attempts:
            return False
        if sequence.num_tokens and not self._restartable:
            return False
        if self._submit(sequence) is not None:
            return False
        log.info("request %s is tried on another worker: %s", sequence.order.request_id, error.message)
        self._metrics.count_retry()
        if sequence.num_tokens:
            sequence.num_tokens = 0
            self._arrive(Arrival(sequence.index, None))
        return True

    def _leave(self, sequence: _Sequence, reason: str) -> None:
        session, sequence.session = sequence.session, None
        self._settle_prefill(sequence)
        if session is not None:
            session.abort(sequence.handle, reason)
            self._workers.retire_if_idle(session)

    def _settle_prefill(self, sequence: _Sequence) -> None:
        target, sequence.target = sequence.target, None
        if target is not None:
            self._workers.count_prefill(target, -sequence.routed.num_prompt_tokens)

    def _arrive(self, arrival: Arrival) -> None:
        self._arrivals.append(arrival)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def error_of(output: pb.Output) -> ApiError:
    """The error that an output with FINISH_REASON_ERROR carries, as the client sees it."""
    return from_worker(output.error) if output.HasField("error") else internal("the worker gave no reason")


def _refused(refusal: Refusal, model: str) -> ApiError:
    words = {
        Refusal.NO_WORKER: "no decode worker is registered",
        Refusal.NOT_CONNECTED: "no decode worker can be reached",
        Refusal.DRAINING: "every decode worker is shutting down",
        Refusal.ALL_TRIED: "every decode worker was tried",
    }
    return unavailable(f"Model `{model}`: {words[refusal]}. Try again later.")
