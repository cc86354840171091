"""The prefill worker's service: runs prompts in chunks and lends their blocks to whoever ordered them.

An order's life, with the side that each step happens on (E: engine thread, L: event loop):

    accepted (L) -> queued (E) -> first chunk scheduled (E) -> lease opened, blocks offered (L)
    -> per step: newly full blocks referenced (E), announced (L)
    -> last chunk computed, first token sampled (E) -> rest announced, `finished` sent (L)
    -> lease closes (L) -> settled (E)

    what goes wrong                      what happens
    the call is cancelled, or breaks     compute aborted, lease (if there is one) revoked, settled once it has closed
    the reader is lost or releases       the lease closes; compute aborted, `failed` sent, settled
    the lease expires                    the same; a reader that comes back is told that the lease was not held
    the order's time-out passes          as a cancelled call, in whatever stage, a prefix fetch too; `failed` sent
    the worker stands still              `failed` sent at once; the rest ends when it gets on, or with the process
    the worker drains                    new orders are refused; running ones and their loans end first

Announced blocks are pinned by references that the order took on the engine thread. Settling gives them back, exactly
once, and only after the lease has closed: no transport of ours touches the blocks then.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash
from kvstore.errors import PeerLost
from kvstore.exchange import Lease
from kvstore.protocol import AnnouncedBlock
from services.engine.api import FinishReason, InvalidRequest, QueueFull, Request, RequestUpdate, StepOutput
from services.lifecycle import Timeline
from services.logs import current_request_id, request_scope
from services.orders import OrderServer
from services.prefill.config import PrefillConfig
from services.worker import convert
from services.worker.assembly import WorkerParts
from services.worker.engine_thread import EngineCrashed
from services.worker.metrics import OrderOutcome
from services.worker.settling import Settlements

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Scheduled:
    """The first chunk is about to be computed."""


@dataclass(frozen=True)
class _Computed:
    """A step's result for one order: blocks that became full, and the end of it with the last chunk."""

    first_index: int
    blocks: list[AnnouncedBlock]
    finished: pb.PrefillFinished | None


class PrefillFailed(Exception):
    """The engine could not get a token out of the prompt."""


class Stuck(Exception):
    """A part of this worker stands still: another one should have the prompt."""


_Send: TypeAlias = Callable[[pb.PrefillEvent], Awaitable[None]]
_Step: TypeAlias = _Scheduled | _Computed | PrefillFailed


@dataclass
class _Order:
    """One prompt on its way."""

    request: Request
    reader_peer_id: str
    transfer_id: bytes
    num_blocks: int
    sources: tuple[pb.PrefixSource, ...] = ()
    steps: list[_Step] = field(default_factory=list)  # that wait to be sent
    has_step: asyncio.Event = field(default_factory=asyncio.Event)  # or the lease has closed
    fetched: list[pb.FetchedPrefix] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)  # engine thread: blocks announced, one reference each
    is_computed: bool = False

    def add_step(self, step: _Step) -> None:
        """Have it sent; what was computed while the reader did not listen goes in one piece."""
        newest = self.steps[-1] if self.steps else None
        if isinstance(newest, _Computed) and isinstance(step, _Computed):
            step = _Computed(newest.first_index, newest.blocks + step.blocks, step.finished)
            self.steps.pop()
        self.steps.append(step)
        self.has_step.set()


class PrefillService:
    """Serves one prefill worker."""

    def __init__(self, config: PrefillConfig, parts: WorkerParts) -> None:
        self._max_num_orders = config.max_num_waiting + parts.engine.capabilities.max_num_seqs
        self._parts = parts
        self._clock = parts.clock
        self._loop = asyncio.get_running_loop()
        self._num_orders = 0
        self._loans = Settlements("loans")
        self._active: dict[str, _Order] = {}  # engine thread: by engine request id, until settled
        self._draining = False
        self._stuck = ""
        self._running: set[asyncio.Timeout] = set()  # what orders run in; brought forward, they end
        self._idle = asyncio.Event()
        self._idle.set()
        parts.metrics.watch_service(lambda: 0, lambda: self._draining)

    def register(self, server: OrderServer) -> None:
        server.serve_prefills(self.serve_prefill)

    # ---- event loop -------------------------------------------------------

    async def serve_prefill(self, message: pb.PrefillRequest, send: _Send) -> None:
        """Run one order; see worker.proto."""
        if self._draining or self._stuck:
            await self._refuse(message, send, "stuck" if self._stuck else "draining")
            return
        if self._num_orders >= self._max_num_orders or self._parts.thread.is_behind:
            await self._refuse(message, send, "full")
            return
        self._num_orders += 1
        started_s = self._clock()
        self._idle.clear()
        outcome: OrderOutcome = "failed"
        order: _Order | None = None
        limit = asyncio.timeout(message.timeout_s if 0 < message.timeout_s < math.inf else None)
        try:
            async with limit, self._while_progress():
                order = self._make_order(
                    message, await convert.prompt_hashes(message, self._parts.engine.layout, self._parts.threads)
                )
                with request_scope(message.request_id):
                    await self._run(order, send)
            outcome = "finished"
        except TimeoutError:
            if not limit.expired():
                raise
            outcome = "expired"
            await send(_failed(pb.ERROR_CODE_DEADLINE, f"no end after {message.timeout_s:g} s of prefill"))
        except asyncio.CancelledError:
            # The decode worker hangs up once it has the last event, perhaps before we hear that this was sent.
            outcome = "finished" if order is not None and order.is_computed else "cancelled"
            raise
        except InvalidRequest as error:
            outcome = "refused"
            self._parts.metrics.refused("invalid")
            await send(_failed(pb.ERROR_CODE_INVALID, str(error)))
        except QueueFull as error:
            outcome = "refused"
            self._parts.metrics.refused("full")
            await send(_failed(pb.ERROR_CODE_OVERLOADED, str(error)))
        except PrefillFailed as error:
            await send(_failed(pb.ERROR_CODE_INTERNAL, str(error)))
        except (PeerLost, EngineCrashed, Stuck) as error:
            await send(_failed(pb.ERROR_CODE_UNAVAILABLE, str(error)))
        finally:
            self._parts.metrics.order_ended(outcome)
            log.info("prefill %s", outcome, extra=_facts(message, started_s, self._clock()))
            self._num_orders -= 1
            if not self._num_orders:
                self._idle.set()

    @asynccontextmanager
    async def _while_progress(self) -> AsyncIterator[None]:
        """Run an order; raises Stuck in it as soon as the worker stands still, whatever it waits for."""
        running = asyncio.timeout(None)
        try:
            async with running:
                self._running.add(running)
                yield
        except TimeoutError as error:
            if not running.expired():
                raise
            raise Stuck(f"{self._parts.worker_id} makes no progress: {self._stuck}") from error
        finally:
            self._running.discard(running)

    async def _refuse(
        self, message: pb.PrefillRequest, send: _Send, reason: Literal["draining", "full", "stuck"]
    ) -> None:
        self._parts.metrics.refused(reason)
        self._parts.metrics.order_ended("refused")
        log.info("prefill refused", extra={"request_id": message.request_id, "error": reason})
        code = pb.ERROR_CODE_OVERLOADED if reason == "full" else pb.ERROR_CODE_UNAVAILABLE
        await send(_failed(code, f"{self._parts.worker_id} is {reason} ({self._num_orders} orders)"))

    def _make_order(self, message: pb.PrefillRequest, hashes: Sequence[BlockHash]) -> _Order:
        if len(message.transfer_id) != 16:
            raise InvalidRequest("transfer_id", f"must have 16 bytes, has {len(message.transfer_id)}")
        request = Request(
            # The client's id may repeat; the transfer's does not.
            request_id=f"{message.request_id}/{message.transfer_id.hex()[:12]}",
            prompt_token_ids=tuple(message.prompt_token_ids),
            resumed_token_ids=tuple(message.resumed_token_ids),
            sampling=convert.sampling_from_proto(message.sampling),
            priority=message.priority,
            cache_salt=message.cache_salt,
            arrival_s=self._clock(),
            hold_blocks=True,
            transfer_id=bytes(message.transfer_id),
            given_hashes=hashes,
            timeline=Timeline(self._clock),
        )
        num_blocks = -(-request.num_context_tokens // self._parts.engine.layout.block_size)
        sources = () if request.wants_prompt_logprobs else tuple(message.prefix_sources)
        return _Order(request, message.reader_peer_id, bytes(message.transfer_id), num_blocks, sources)

    async def _run(self, order: _Order, send: _Send) -> None:
        thread = self._parts.thread
        lease: Lease | None = None
        finished = False
        try:
            await self._fetch_prefix(order)
            await thread.call(self._submit, order)
            while not finished:
                step = await self._next_step(order, lease)
                if isinstance(step, _Scheduled):
                    lease = self._lend(order)
                    await send(pb.PrefillEvent(scheduled=pb.PrefillScheduled()))
                    continue
                assert lease is not None, f"{order.request.request_id}: computed before it was scheduled"
                finished = step.finished is not None
                lease.announce(step.first_index, step.blocks, last=finished)
                if step.finished is not None:
                    order.is_computed = True
                    self._parts.metrics.requests.prefilled(order.request.timeline)
                    step.finished.rates.CopyFrom(convert.rates_to_proto(self._parts.rates.rates))
                    await send(pb.PrefillEvent(finished=step.finished))
        finally:
            if lease is None:
                thread.post(self._settle, order)
            elif not finished:
                thread.post(self._parts.engine.abort, order.request.request_id)
                lease.revoke("the prefill was abandoned")

    async def _fetch_prefix(self, order: _Order) -> None:
        has_host_tier = self._parts.engine.capabilities.num_host_blocks > 0
        if order.sources or (has_host_tier and not order.request.wants_prompt_logprobs):
            order.fetched = await self._parts.fetcher.fetch(order.request.given_hashes, order.sources)

    async def _next_step(self, order: _Order, lease: Lease | None) -> _Scheduled | _Computed:
        """The order's next step; PeerLost if the lease closes first."""
        await order.has_step.wait()
        if lease is not None and lease.closed.done():
            raise PeerLost(
                f"{order.request.request_id}: the lease for {order.reader_peer_id} closed during prefill "
                f"({lease.closed.result().name})"
            )
        step = order.steps.pop(0)
        if not order.steps:
            order.has_step.clear()
        if isinstance(step, PrefillFailed):
            raise step
        return step

    def _lend(self, order: _Order) -> Lease:
        """Open the lease, and see to it that the order is settled when it has closed."""
        lease = self._parts.exchange.open_lease(
            order.transfer_id, order.reader_peer_id, order.num_blocks, current_request_id()
        )
        lease.closed.add_done_callback(lambda _: order.has_step.set())
        self._loans.start(self._settle_after(lease, order), name=f"loan-{order.request.request_id}")
        return lease

    async def _settle_after(self, lease: Lease, order: _Order) -> None:
        outcome = await lease.closed
        log.debug("lease of transfer %s closed: %s", order.transfer_id.hex(), outcome.name)
        await self._parts.thread.call(self._settle, order)

    def state(self) -> dict[str, object]:
        return {"orders": self._num_orders, "loans": len(self._loans), "draining": self._draining}

    def set_stuck(self, stuck: str) -> None:
        self._stuck = stuck
        if stuck:
            for running in self._running:
                if not running.expired():
                    running.reschedule(self._loop.time())

    def begin_drain(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        self.begin_drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                await self._loans.ended()
        except TimeoutError:
            log.warning("still %d orders and %d loans after %g s", self._num_orders, len(self._loans), timeout_s)

    async def close(self) -> None:
        """Orders end with the gRPC server, loans with the exchange."""
        self._draining = True

    async def settle(self) -> None:
        await self._loans.settled()

    # ---- engine thread ----------------------------------------------------

    def _submit(self, order: _Order) -> None:
        self._parts.engine.add_request(order.request)
        self._active[order.request.request_id] = order

    def _settle(self, order: _Order) -> None:
        """Give back all that the order holds. Also for one that was never submitted."""
        if self._active.pop(order.request.request_id, None) is not None:
            self._parts.engine.abort(order.request.request_id)
            self._parts.engine.release_blocks(order.pinned)
            order.pinned = []

    def on_begun(self, request: Request) -> None:
        self._deliver(request, _Scheduled())

    def on_step(self, output: StepOutput) -> None:
        for update in output.updates:
            order = self._active.get(update.request.request_id)
            if order is None:
                continue
            if update.finish_reason is FinishReason.ERROR:
                self._deliver(update.request, PrefillFailed(f"{update.request.request_id}: {update.failure}"))
            else:
                self._deliver(update.request, self._computed(order, update))

    def _deliver(self, request: Request, step: _Step) -> None:
        order = self._active[request.request_id]
        self._loop.call_soon_threadsafe(order.add_step, step)

    def _computed(self, order: _Order, update: RequestUpdate) -> _Computed:
        """Take over what became announceable."""
        order.pinned.extend(block.block_id for block in update.blocks)
        finished = _finished(update, order.fetched) if update.new_tokens else None
        return _Computed(update.first_block, list(update.blocks), finished)


def _facts(message: pb.PrefillRequest, started_s: float, now_s: float) -> dict[str, object]:
    """Return the log's facts of an order beside its outcome."""
    return {
        "request_id": message.request_id,
        "prompt_tokens": len(message.prompt_token_ids),
        "resumed_tokens": len(message.resumed_token_ids),
        "reader": message.reader_peer_id.partition("/")[0],
        "transfer": message.transfer_id.hex(),
        "seconds": round(now_s - started_s, 4),
    }


def _finished(update: RequestUpdate, fetched: list[pb.FetchedPrefix]) -> pb.PrefillFinished:
    token = update.new_tokens[0]
    message = pb.PrefillFinished(
        token_id=token.token_id,
        num_cached_tokens=update.num_cached_tokens,
        num_resumed_tokens=len(update.request.resumed_token_ids),
        stamps=convert.stamps_to_proto(update.request.timeline),
        fetched=fetched,
    )
    if token.logprobs is not None:
        message.logprobs.CopyFrom(convert.logprobs_to_proto(token.logprobs))
    if update.prompt_logprobs is not None:
        message.prompt_logprobs.extend(convert.prompt_logprobs_to_proto(update.prompt_logprobs))
    if update.finish_reason is not None and update.finish_reason is not FinishReason.HANDED_OFF:
        message.finish_reason = convert.FINISH_REASONS[update.finish_reason]
    if update.stop_token_id is not None:
        message.stop_token_id = update.stop_token_id
    return message


def _failed(code: pb.ErrorCode, message: str) -> pb.PrefillEvent:
    return pb.PrefillEvent(failed=pb.Error(code=code, message=message))
