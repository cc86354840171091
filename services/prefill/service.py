"""The prefill worker's service: runs prompts in chunks and lends their blocks to whoever ordered them.

`order.py` says what becomes of an order, whatever happens; here it happens (E: engine thread, L: event loop):

    call begins, prefix fetched (L) -> queued (E) -> first chunk scheduled (E) -> lease opened, blocks offered (L)
    -> per step: newly full blocks referenced (E), announced (L)
    -> last chunk computed, first token sampled (E) -> rest announced, `finished` sent (L)
    -> lease closes (L) -> settled (E)

Who drains refuses new orders; running ones and their loans end first, or when its time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash
from kvstore.exchange import Lease
from kvstore.protocol import AnnouncedBlock
from services.engine.api import FinishReason, InvalidRequest, Request, RequestUpdate, StepOutput
from services.lifecycle import Timeline
from services.logs import request_scope
from services.orders import OrderServer
from services.prefill.config import PrefillConfig
from services.prefill.endings import error_of, facts_of, failed_of, finished_of
from services.prefill.order import TRANSITIONS, OrderAction, OrderEvent, OrderState
from services.worker import convert
from services.worker.assembly import WorkerParts
from services.worker.engine_thread import EngineCrashed
from services.worker.metrics import OrderOutcome, Refusal
from services.worker.settling import Settlements
from services.worker.states import States

log = logging.getLogger(__name__)

_REFUSALS: Final[Mapping[int, Refusal]] = {pb.ERROR_CODE_INVALID: "invalid", pb.ERROR_CODE_OVERLOADED: "full"}


@dataclass(frozen=True)
class _Chunk:
    """A step's result for one order: blocks that became full, and the order's end with the last ones."""

    first_index: int
    blocks: list[AnnouncedBlock]
    finished: pb.PrefillFinished | None


_Send: TypeAlias = Callable[[pb.PrefillEvent], Awaitable[None]]


@dataclass(eq=False)
class _Order:
    """One prompt on its way. The event loop's, but for what says otherwise."""

    message: pb.PrefillRequest
    states: States[OrderState, OrderEvent, OrderAction]
    started_s: float
    outcome: OrderOutcome = "cancelled"
    preparation: asyncio.Task[None] | None = None
    timeout: asyncio.TimerHandle | None = None
    request: Request | None = None  # once it is prepared
    lease: Lease | None = None
    unsent: list[pb.PrefillEvent] = field(default_factory=list)
    has_unsent: asyncio.Event = field(default_factory=asyncio.Event)
    fetched: list[pb.FetchedPrefix] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)  # engine thread: blocks announced, one reference each

    def send(self, event: pb.PrefillEvent) -> None:
        self.unsent.append(event)
        self.has_unsent.set()

    async def send_all(self, send: _Send) -> None:
        """Send what there is to send, until the last event."""
        while True:
            await self.has_unsent.wait()
            event = self.unsent.pop(0)
            if not self.unsent:
                self.has_unsent.clear()
            await send(event)
            if not event.HasField("scheduled"):
                return


class PrefillService:
    """Serves one prefill worker."""

    def __init__(self, config: PrefillConfig, parts: WorkerParts) -> None:
        self._max_num_orders = config.max_num_waiting + parts.engine.capabilities.max_num_seqs
        self._parts = parts
        self._clock = parts.clock
        self._loop = asyncio.get_running_loop()
        self._orders: dict[_Order, None] = {}  # whose calls go on, in their order
        self._loans = Settlements("loans")
        self._active: dict[str, _Order] = {}  # engine thread: by engine request id, until settled
        self._draining = False
        self._stuck = ""
        self._idle = asyncio.Event()
        self._idle.set()
        parts.metrics.watch_service(lambda: 0, lambda: self._draining)

    def register(self, server: OrderServer) -> None:
        server.serve_prefills(self.serve_prefill)

    # ---- calls -------------------------------------------------------------

    async def serve_prefill(self, message: pb.PrefillRequest, send: _Send) -> None:
        """Run one order; see worker.proto."""
        if self._draining or self._stuck:
            await self._refuse(message, send, "stuck" if self._stuck else "draining")
            return
        if len(self._orders) >= self._max_num_orders or self._parts.thread.is_behind:
            await self._refuse(message, send, "full")
            return
        name = f"order {message.request_id}/{message.transfer_id.hex()}"
        order = _Order(message, States(name, TRANSITIONS, OrderState.PREPARING), self._clock())
        self._orders[order] = None
        self._idle.clear()
        with request_scope(message.request_id):
            order.preparation = asyncio.create_task(self._prepare(order), name=f"prepare-{message.request_id}")
        order.preparation.add_done_callback(lambda done: self._prepared(order, done))
        if 0 < message.timeout_s < math.inf:
            order.timeout = self._loop.call_later(message.timeout_s, self._expire, order)
        try:
            await order.send_all(send)
        finally:
            self._call_ended(order)
            await asyncio.wait([order.preparation])

    def _call_ended(self, order: _Order) -> None:
        if order.outcome == "cancelled" or order.unsent:
            order.outcome = "cancelled"
            self._tell(order, OrderEvent.HUNG_UP)
        else:
            self._tell(order, OrderEvent.CALL_ENDED)
        if order.timeout is not None:
            order.timeout.cancel()
        self._parts.metrics.order_ended(order.outcome)
        log.info("prefill %s", order.outcome, extra=facts_of(order.message, self._clock() - order.started_s))
        del self._orders[order]
        if not self._orders:
            self._idle.set()

    async def _refuse(
        self, message: pb.PrefillRequest, send: _Send, reason: Literal["draining", "full", "stuck"]
    ) -> None:
        self._parts.metrics.refused(reason)
        self._parts.metrics.order_ended("refused")
        log.info("prefill refused", extra={"request_id": message.request_id, "error": reason})
        code = pb.ERROR_CODE_OVERLOADED if reason == "full" else pb.ERROR_CODE_UNAVAILABLE
        await send(failed_of(code, f"{self._parts.worker_id} is {reason} ({len(self._orders)} orders)"))

    # ---- what happens to an order -------------------------------------------

    async def _prepare(self, order: _Order) -> None:
        message = order.message
        hashes = await convert.prompt_hashes(message, self._parts.engine.layout, self._parts.threads)
        request = order.request = self._make_request(message, hashes)
        sources = () if request.wants_prompt_logprobs else tuple(message.prefix_sources)
        has_host_tier = self._parts.engine.capabilities.num_host_blocks > 0
        if sources or (has_host_tier and not request.wants_prompt_logprobs):
            order.fetched = await self._parts.fetcher.fetch(request.given_hashes, sources)

    def _make_request(self, message: pb.PrefillRequest, hashes: Sequence[BlockHash]) -> Request:
        if len(message.transfer_id) != 16:
            raise InvalidRequest("transfer_id", f"must have 16 bytes, has {len(message.transfer_id)}")
        return Request(
            # The client's id may repeat; the transfer's does not.
            request_id=f"{message.request_id}/{message.transfer_id.hex()[:12]}",
            prompt_token_ids=tuple(message.prompt_token_ids),
            resumed_token_ids=tuple(message.resumed_token_ids),
            sampling=convert.sampling_from_proto(message.sampling),
            priority=message.priority,
            cache_salt=message.cache_salt,
            adapter=message.adapter,
            arrival_s=self._clock(),
            hold_blocks=True,
            transfer_id=bytes(message.transfer_id),
            given_hashes=hashes,
            timeline=Timeline(self._clock),
        )

    def _prepared(self, order: _Order, preparation: asyncio.Task[None]) -> None:
        if preparation.cancelled():
            message = "its preparation was cancelled, as nobody had ordered"
            self._tell(order, OrderEvent.REFUSED, pb.Error(code=pb.ERROR_CODE_INTERNAL, message=message))
        elif (failure := preparation.exception()) is not None:
            self._tell(order, OrderEvent.REFUSED, error_of(failure))
        else:
            self._tell(order, OrderEvent.PREPARED)

    def _submitted(self, order: _Order, submission: asyncio.Future[None]) -> None:
        if not submission.cancelled() and (failure := submission.exception()) is not None:
            self._tell(order, OrderEvent.REFUSED, error_of(failure))

    def _expire(self, order: _Order) -> None:
        message = f"no end after {order.message.timeout_s:g} s of prefill"
        self._tell(order, OrderEvent.EXPIRED, pb.Error(code=pb.ERROR_CODE_DEADLINE, message=message))

    def _stop(self, why: str) -> None:
        """End all orders that have no token yet: another worker should have them."""
        for order in list(self._orders):
            self._tell(order, OrderEvent.STOPPED, pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message=why))

    async def _loan(self, order: _Order, lease: Lease) -> None:
        outcome = await lease.closed
        log.debug("lease of transfer %s closed: %s", order.message.transfer_id.hex(), outcome.name)
        message = f"the lease for {order.message.reader_peer_id} closed during prefill ({outcome.name})"
        self._tell(order, OrderEvent.LEASE_CLOSED, pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message=message))

    # ---- what is done then ---------------------------------------------------

    def _tell(
        self, order: _Order, event: OrderEvent, error: pb.Error | None = None, chunk: _Chunk | None = None
    ) -> None:
        """Do what an event leads to. `error`: what the caller is told if the order fails of it."""
        actions = order.states.move(event)
        with request_scope(order.message.request_id):
            try:
                for action in actions:
                    self._do(action, order, error, chunk)
            except Exception as failure:
                self._tell(order, OrderEvent.BROKEN, error_of(failure))

    def _do(self, action: OrderAction, order: _Order, error: pb.Error | None, chunk: _Chunk | None) -> None:
        match action:
            case OrderAction.CANCEL:
                assert order.preparation is not None
                order.preparation.cancel()
            case OrderAction.SUBMIT:
                submission = self._parts.thread.call(self._submit, order)
                submission.add_done_callback(lambda done: self._submitted(order, done))
            case OrderAction.LEND:
                self._lend(order)
            case OrderAction.ANNOUNCE:
                assert chunk is not None
                assert order.lease is not None
                order.lease.announce(chunk.first_index, chunk.blocks, last=chunk.finished is not None)
            case OrderAction.FINISH:
                assert chunk is not None
                assert chunk.finished is not None
                self._finish(order, chunk.finished)
            case OrderAction.FAIL:
                assert error is not None
                self._fail(order, error)
            case OrderAction.REVOKE:
                assert order.request is not None
                assert order.lease is not None
                self._parts.thread.post(self._parts.engine.abort, order.request.request_id)
                order.lease.revoke("the prefill was abandoned")
            case OrderAction.SETTLE:
                self._loans.start(self._give_back(order), name=f"settle-{order.message.request_id}")

    def _lend(self, order: _Order) -> None:
        """Open the lease. Where its reader is gone already, it has closed."""
        message, layout = order.message, self._parts.engine.layout
        assert order.request is not None
        num_blocks = -(-order.request.num_context_tokens // layout.block_size)
        try:
            lease = order.lease = self._parts.exchange.open_lease(
                order.request.transfer_id, message.reader_peer_id, num_blocks, message.request_id
            )
        except Exception as failure:
            self._tell(order, OrderEvent.LEASE_CLOSED, error_of(failure))
            return
        self._loans.start(self._loan(order, lease), name=f"loan-{message.request_id}")
        order.send(pb.PrefillEvent(scheduled=pb.PrefillScheduled()))

    def _finish(self, order: _Order, finished: pb.PrefillFinished) -> None:
        assert order.request is not None
        self._parts.metrics.requests.prefilled(order.request.timeline)
        finished.rates.CopyFrom(convert.rates_to_proto(self._parts.rates.rates))
        self._end(order, "finished", pb.PrefillEvent(finished=finished))

    def _fail(self, order: _Order, error: pb.Error) -> None:
        refusal = _REFUSALS.get(error.code)
        if refusal is not None:
            self._parts.metrics.refused(refusal)
        outcome: OrderOutcome = "expired" if error.code == pb.ERROR_CODE_DEADLINE else "failed"
        self._end(order, "refused" if refusal else outcome, pb.PrefillEvent(failed=error))

    def _end(self, order: _Order, outcome: OrderOutcome, last: pb.PrefillEvent) -> None:
        """Send the last event. The call ends with it."""
        order.outcome = outcome
        if order.timeout is not None:
            order.timeout.cancel()
        order.send(last)

    async def _give_back(self, order: _Order) -> None:
        with contextlib.suppress(EngineCrashed):  # its blocks went with it
            await self._parts.thread.call(self._settle, order)

    # ---- the process ----------------------------------------------------------

    def state(self) -> dict[str, object]:
        return {"orders": len(self._orders), "loans": len(self._loans), "draining": self._draining}

    def set_stuck(self, stuck: str) -> None:
        self._stuck = stuck
        if stuck:
            self._stop(f"{self._parts.worker_id} makes no progress: {stuck}")

    def begin_drain(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        self.begin_drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                await self._loans.ended()
        except TimeoutError:
            log.warning("still %d orders and %d loans after %g s", len(self._orders), len(self._loans), timeout_s)
            self._stop(f"{self._parts.worker_id} drains, and {timeout_s:g} s were all the time that it had")

    async def close(self) -> None:
        """Orders end with the gRPC server, loans with the exchange."""
        self._draining = True

    async def settle(self) -> None:
        await self._loans.settled()

    # ---- engine thread ----------------------------------------------------

    def _submit(self, order: _Order) -> None:
        assert order.request is not None
        self._parts.engine.add_request(order.request)
        self._active[order.request.request_id] = order

    def _settle(self, order: _Order) -> None:
        """Give back all that the order holds. Also for one that was never submitted."""
        if order.request is not None and self._active.pop(order.request.request_id, None) is not None:
            self._parts.engine.abort(order.request.request_id)
            self._parts.engine.release_blocks(order.pinned)
            order.pinned = []

    def on_begun(self, request: Request) -> None:
        order = self._active.get(request.request_id)
        if order is not None:  # else it is none of ours: an elastic worker has live requests, too
            self._report(order, OrderEvent.BEGUN)

    def on_step(self, output: StepOutput) -> None:
        for update in output.updates:
            order = self._active.get(update.request.request_id)
            if order is None:
                continue
            if update.finish_reason is FinishReason.ERROR:
                message = f"{update.request.request_id}: {update.failure}"
                self._report(order, OrderEvent.NO_TOKEN, pb.Error(code=pb.ERROR_CODE_INTERNAL, message=message))
            else:
                chunk = self._computed(order, update)
                event = OrderEvent.CHUNK if chunk.finished is None else OrderEvent.LAST_CHUNK
                self._report(order, event, None, chunk)

    def _report(
        self, order: _Order, event: OrderEvent, error: pb.Error | None = None, chunk: _Chunk | None = None
    ) -> None:
        self._loop.call_soon_threadsafe(self._tell, order, event, error, chunk)

    def _computed(self, order: _Order, update: RequestUpdate) -> _Chunk:
        """Take over what became announceable."""
        order.pinned.extend(block.block_id for block in update.blocks)
        finished = finished_of(update, order.fetched) if update.new_tokens else None
        return _Chunk(update.first_block, list(update.blocks), finished)
