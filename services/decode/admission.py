"""Brings a request into the engine: with its blocks from another decode worker, or prefilled elsewhere, or here.

Every failure of a move leads to a handoff, every failure of that to the next prefill worker and at last to a local
prefill: it costs time, no answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash
from kvstore.errors import IncompatiblePeer, PeerLost, PeerUnreachable
from kvstore.exchange import Fetch
from kvstore.protocol import FetchCause, FetchResult, FetchStamps
from services.decode.config import DecodeConfig
from services.decode.handoff import NOT_JOINED, SILENT, Handoff, HandoffFailed, NoRoomHere, prefill_remotely
from services.decode.live import LiveRequest
from services.decode.news import News, news_of, news_of_first
from services.decode.redirecting import Redirected, source_of
from services.decode.reservation import PendingReservation
from services.engine.api import EngineError, Request, RequestUpdate, SampledToken
from services.lifecycle import Event
from services.worker import convert
from services.worker.assembly import WorkerParts
from services.worker.prefixes import Shunned
from services.worker.settling import Settlements

log = logging.getLogger(__name__)

_SHUNNED_FOR = frozenset({"unreachable", SILENT, FetchCause.PEER_LOST.value})


class MoveFailed(Exception):
    """The blocks of a request that comes from another decode worker could not be had; the message says why."""


class Admission:
    """Gets live requests into the engine."""

    def __init__(
        self,
        config: DecodeConfig,
        parts: WorkerParts,
        entered: Callable[[LiveRequest, Request], None],
        deliver: Callable[[Sequence[News]], None],
    ) -> None:
        """`entered` is called on the engine thread, before the request's first step; `deliver` sends what there is to
        say before that.
        """
        self._config = config
        self._parts = parts
        self._entered = entered
        self._deliver = deliver
        self._clock = parts.clock
        self._loop = asyncio.get_running_loop()
        self._disposals = Settlements("failed handoffs")
        # Starts of prefill workers. Each that does not answer costs a request seconds, so the next does not ask it.
        self._shunned = Shunned(self._loop.time)
        self._being_handed_over: dict[tuple[object, ...], asyncio.Task[None]] = {}  # admissions, by prompt

    async def admit(self, live: LiveRequest) -> None:
        """Bring the request into the engine, by whichever way works. Raises InvalidRequest, QueueFull,
        EngineCrashed.
        """
        hashes = live.hashes = await convert.prompt_hashes(live.order, self._parts.engine.layout, self._parts.threads)
        if live.order.HasField("move"):
            try:
                await self._take_over(live, live.order.move, hashes)
                return
            except MoveFailed as failure:
                log.warning("the blocks of %s are not to be had: %s", live.order.move.worker_id, failure)
                self._parts.metrics.moved("recomputed")
                self._parts.metrics.recomputed("move")
                live.usage.num_recomputes += 1
        while True:
            try:
                with live.course.open():
                    enter = await self._prepared(live, hashes)
                break
            except Redirected:
                log.info("its prompt is redirected", extra={"request_id": live.order.request_id})
        try:
            await enter()
        except HandoffFailed as failure:  # it has its first token, and goes on behind it
            self._count_failure(live, live.usage.prefill_worker_id, failure)
            await self._fetch(live, hashes)
            await self._enter_here(live)

    async def _prepared(self, live: LiveRequest, hashes: list[BlockHash]) -> Callable[[], Awaitable[None]]:
        """Have what the request needs here: its prompt computed elsewhere, or its prefix fetched. Returns what then
        brings it into the engine.
        """
        if live.sampling.prompt_logprobs is None:
            # Before it is decided who prefills: what is here already is neither computed nor handed over.
            await self._parts.host_prefixes.restore(hashes)
        if not self._is_local(live, hashes) and not await self._is_brought_by_another(live, hashes):
            shunned = self._shunned.names()
            for target in live.order.prefill_targets:
                if target.worker_id == self._parts.worker_id:
                    break  # an elastic worker's own prompts need no order
                if target.incarnation in shunned:
                    continue
                self._goes_to(live, target.worker_id)
                try:
                    request, handoff = await self._prefill_elsewhere(live, target, hashes)
                    return partial(self._take_in, live, request, target, handoff)
                except HandoffFailed as failure:
                    if failure.cause in _SHUNNED_FOR:
                        self._shunned.add(target.incarnation)
                    self._count_failure(live, target.worker_id, failure)
                    if isinstance(failure, NoRoomHere):
                        break
        self._goes_to(live, self._parts.worker_id)
        await self._fetch(live, hashes)
        return partial(self._enter_here, live)

    def prepare_anew(self, live: LiveRequest) -> None:
        """The engine has given it up: whoever computes its prompt now may have what was computed here."""
        computed = pb.PrefixSource(
            holder_id=self._parts.worker_id,
            incarnation=self._parts.incarnation,
            kv_address=self._parts.kv_address,
            num_blocks=self._parts.engine.peek_prefix(live.hashes),
            tier="device",
        )
        live.course.ends_at(computed)
        live.usage.prefilled_locally = False

    def _goes_to(self, live: LiveRequest, worker_id: str) -> None:
        if live.course.goes_to(worker_id):
            live.usage.num_redirects += 1
            self._parts.metrics.redirected("here" if worker_id == self._parts.worker_id else "elsewhere")

    def _count_failure(self, live: LiveRequest, worker_id: str, failure: HandoffFailed) -> None:
        log.warning("prefill by %s failed (%s): %s", worker_id, failure.cause, failure)
        self._parts.metrics.handoff_failed(failure.cause)
        self._parts.metrics.recomputed("handoff")
        live.usage.num_recomputes += 1

    async def close(self) -> None:
        """Wait for what failed handoffs left. Bounded, since the exchange is closed by then."""
        await self._disposals.settled()

    def _is_local(self, live: LiveRequest, hashes: list[BlockHash]) -> bool:
        if self._config.colocated or not live.order.prefill_targets:
            return True
        return self._num_uncached(live, hashes) <= self._config.local_prefill_max_tokens

    async def _is_brought_by_another(self, live: LiveRequest, hashes: list[BlockHash]) -> bool:
        """Wait where this very prompt is being handed over for another request; whether its blocks have come.

        So n choices of a prompt move its blocks once: the others share them, copy the last one from whoever runs on it,
        and compute one token each. A first that fails is waited for once only: then everybody tries at the same time.
        """
        order = live.order
        num_left = live.sampling.max_tokens - len(live.resumed_token_ids)
        if live.sampling.prompt_logprobs is not None or num_left == 1:
            return False  # of those, the first needs every position, and the second no blocks
        tail = convert.context_token_ids(order)[len(hashes) * self._parts.engine.layout.block_size :]
        prompt = (order.cache_salt, order.adapter, order.priority, *hashes[-1:], *tail)
        first = self._being_handed_over.get(prompt)
        if first is None or first is live.admission:
            assert live.admission is not None, f"{order.request_id} is admitted by no task"
            if first is None:
                self._being_handed_over[prompt] = live.admission
                live.admission.add_done_callback(lambda _: self._being_handed_over.pop(prompt))
            return False
        await asyncio.wait([first])
        return self._parts.engine.peek_prefix(hashes) == len(hashes)

    def _num_uncached(self, live: LiveRequest, hashes: list[BlockHash]) -> int:
        """Context tokens that would be computed here; the last one always is."""
        num_tokens = live.num_context_tokens
        if live.sampling.prompt_logprobs is None:
            # A hint, read from outside the engine thread: dictionary lookups, and nothing is held on its account.
            num_tokens -= self._parts.engine.peek_prefix(hashes) * self._parts.engine.layout.block_size
        return max(1, num_tokens)

    async def _fetch(self, live: LiveRequest, hashes: list[BlockHash]) -> None:
        """Bring in what others have of a prompt that is to be computed here."""
        fetched: list[pb.FetchedPrefix] = []
        if (
            live.sampling.prompt_logprobs is None
            and self._num_uncached(live, hashes) > self._parts.engine.layout.block_size
        ):
            fetched = await self._parts.fetcher.fetch(hashes, live.course.sources(live.order))
            live.usage.fetched.extend(fetched)
        live.course.begins_here(self._parts.worker_id, self._parts.engine.peek_prefix(hashes), fetched)

    async def _enter_here(self, live: LiveRequest) -> None:
        live.usage.prefilled_locally = True
        live.request = request = live.new_attempt(self._clock())

        def enter() -> None:
            self._parts.engine.add_request(request)
            self._entered(live, request)

        await self._parts.thread.call(enter)

    async def _take_over(self, live: LiveRequest, move: pb.Move, hashes: list[BlockHash]) -> None:
        """Go on from the blocks that the request has left at another decode worker. Raises MoveFailed.

        It is a handoff whose prompt is all but the newest token, which is the one that comes with it: no step has
        computed its KV yet.
        """
        num_computed, block_size = live.num_context_tokens - 1, self._parts.engine.layout.block_size
        if not live.resumed_token_ids or move.num_tokens != num_computed or len(move.transfer_id) != 16:
            raise MoveFailed(f"{move.num_tokens} tokens were computed there, {num_computed} are needed here")
        full = hashes[: num_computed // block_size]
        attempt, resumed = live.new_attempt(self._clock()), live.resumed_token_ids
        request = replace(attempt, resumed_token_ids=resumed[:-1], given_hashes=full)
        self._parts.engine.check(request)
        pending = PendingReservation(self._parts, request)
        exchange, started_s = self._parts.exchange, self._parts.exchange.clock()
        expected = [*full, None][: -(-num_computed // block_size)]
        try:
            owner = await exchange.connect(move.kv_address)
            fetch = exchange.fetch_kept(move.transfer_id, owner, expected, pending.reserve, move.incarnation or None)
        except (PeerUnreachable, PeerLost, IncompatiblePeer, ValueError) as error:
            # ValueError: the order has come before, and what that one fetches has not ended yet.
            raise MoveFailed(str(error)) from error
        taken = False
        try:
            fetched = await fetch.result
            if fetched.failure is not None:
                raise MoveFailed(f"{fetched.failure.cause.value}: {fetched.failure.detail}")
            taken = True
        finally:
            if not taken:
                self._dispose(fetch, pending)
        # No await from here to the engine's call, as in a handoff.
        live.usage.num_cached_tokens = live.num_context_tokens
        live.usage.moved.holder_id, live.usage.moved.tier = move.worker_id, "device"
        live.usage.moved.lane = exchange.lane_to(owner)
        live.usage.moved.num_blocks, live.usage.moved.num_bytes = fetched.num_blocks, fetched.num_bytes
        live.usage.moved.seconds = exchange.clock() - started_s
        try:
            await self._joined(live, self._enter(live, request, fetched, SampledToken(resumed[-1], None)))
        except EngineError as error:
            live.usage.ClearField("moved")
            live.usage.num_cached_tokens = 0
            raise MoveFailed(f"the engine did not take them: {error}") from error
        self._parts.metrics.moved("joined")

    async def _prefill_elsewhere(
        self, live: LiveRequest, target: pb.PrefillTarget, hashes: list[BlockHash]
    ) -> tuple[Request, Handoff]:
        """Order it there and take its blocks over, for the request that is to join. Raises HandoffFailed."""
        request = live.new_attempt(self._clock())
        # Before anybody computes it: what our own engine cannot serve is no other worker's failure.
        self._parts.engine.check(request)
        pending = PendingReservation(self._parts, request)
        num_blocks = -(-request.num_context_tokens // self._parts.engine.layout.block_size)
        order = pb.PrefillRequest(
            request_id=live.order.request_id,
            prompt_token_ids=live.order.prompt_token_ids,
            resumed_token_ids=live.order.resumed_token_ids,
            prompt_hashes=live.order.prompt_hashes,
            sampling=live.order.sampling if live.lists is None else live.lists.whole(live.order.sampling),
            priority=live.order.priority,
            cache_salt=live.order.cache_salt,
            adapter=live.order.adapter,
            prefix_sources=live.course.sources(live.order),
            timeout_s=live.left_s(),
        )
        live.timeline.mark(Event.PREFILL_ORDERED)
        num_announced = 0

        def dispose(fetch: Fetch) -> None:
            nonlocal num_announced
            num_announced = fetch.num_announced
            self._dispose(fetch, pending)

        try:
            handoff = await prefill_remotely(
                order,
                target,
                [*hashes, None][:num_blocks],
                pending.reserve,
                self._parts.exchange,
                self._parts.orders,
                dispose=dispose,
                finish_timeout_s=self._config.handoff_timeout_s,
            )
        except (asyncio.CancelledError, NoRoomHere):  # it has what it has computed, and may lend it
            live.course.ends_at(source_of(target, min(num_announced, len(hashes))))
            raise
        # No await from here to the engine's call: the blocks are ours now, and must not be lost to a cancellation.
        return request, handoff

    async def _take_in(self, live: LiveRequest, request: Request, target: pb.PrefillTarget, handoff: Handoff) -> None:
        """Go on from what a prefill worker has computed. Raises HandoffFailed where the engine does not."""
        live.course.came(target.worker_id, handoff.finished.fetched)
        num_computed = live.course.num_computed_blocks * self._parts.engine.layout.block_size
        live.usage.prefill_worker_id = target.worker_id
        live.usage.num_cached_tokens = max(0, handoff.finished.num_cached_tokens - num_computed)
        live.usage.fetched.extend(handoff.finished.fetched)
        live.usage.prefill_rates.CopyFrom(handoff.finished.rates)
        convert.copy_stamps(handoff.finished.stamps, live.timeline)
        if handoff.fetched is None:
            self._deliver([news_of_first(live, handoff.finished)])  # its last token, too
        else:
            await self._join(live, request, handoff.finished, handoff.fetched)

    async def _join(
        self, live: LiveRequest, request: Request, finished: pb.PrefillFinished, fetched: FetchResult
    ) -> None:
        """Have the engine go on from the blocks. Raises HandoffFailed.

        The first token goes to the client, unless the engine samples one itself, which is then compared: at once where
        the engine is busy with a step, else when it has taken the request, which would wait for the event loop to send.
        """
        live.usage.num_transferred_blocks = fetched.num_blocks
        live.usage.num_transferred_bytes = fetched.num_bytes
        self._parts.metrics.handed_off(fetched.num_blocks, fetched.num_bytes)
        self._stamp_transfer(live, fetched.stamps)
        samples_first = self._parts.engine.capabilities.samples_first_token
        if samples_first:
            live.said_elsewhere = finished
            joining = self._enter(live, request, fetched, None)
        else:
            logprobs = convert.logprobs_from_proto(finished.logprobs) if finished.HasField("logprobs") else None
            token, is_said = SampledToken(finished.token_id, logprobs), self._parts.thread.is_in_turn
            if is_said:
                self._say_first(live, finished)
            tried = None if is_said else partial(self._loop.call_soon_threadsafe, self._say_first, live, finished)
            joining = self._enter(live, request, fetched, token, tried)
        try:
            await self._joined(live, joining)
        except EngineError as error:
            live.said_elsewhere = None
            if not samples_first:
                live.resumed_token_ids += (finished.token_id,)
            raise HandoffFailed(NOT_JOINED, f"the engine did not take the blocks: {error}") from error

    def _say_first(self, live: LiveRequest, finished: pb.PrefillFinished) -> None:
        self._deliver([news_of_first(live, finished)])

    async def _joined(self, live: LiveRequest, joining: asyncio.Future[RequestUpdate]) -> None:
        """This worker's context may be shorter than the other one's, and the token that came the last after all."""
        update = await joining
        if update.finish_reason is not None:
            self._deliver([news_of(live, replace(update, new_tokens=()))])

    def _enter(
        self,
        live: LiveRequest,
        request: Request,
        fetched: FetchResult,
        token: SampledToken | None,
        tried: Callable[[], object] | None = None,
    ) -> asyncio.Future[RequestUpdate]:
        """Have the engine take it. `tried`: called by its thread once it has, or has not, before the next step."""
        live.request = request

        def enter() -> RequestUpdate:
            try:
                update = self._parts.engine.add_prefilled(request, fetched.block_ids, fetched.proofs, token)
            except EngineError:
                self._parts.engine.release_reservation(request, fetched.block_ids)
                raise
            finally:
                if tried is not None:
                    tried()
            if update.finish_reason is None:
                live.has_token = True
                self._entered(live, request)
            return update

        return self._parts.thread.call(enter)

    def _stamp_transfer(self, live: LiveRequest, stamps: FetchStamps) -> None:
        """Take the transfer's moments over, from the exchange's clock to ours."""
        offset_s = self._clock() - self._parts.exchange.clock()
        for event, at_s in ((Event.BLOCKS_READ, stamps.verified), (Event.HANDOFF_CONFIRMED, stamps.confirmed)):
            if at_s is not None:
                live.timeline.unix_s[event] = at_s + offset_s

    def _dispose(self, fetch: Fetch, pending: PendingReservation) -> None:
        self._disposals.start(self._free_after(fetch, pending), name="dispose-fetch")

    async def _free_after(self, fetch: Fetch, pending: PendingReservation) -> None:
        """Free what an abandoned fetch leaves, once no late byte can arrive in it."""
        fetch.abort("abandoned by the decode worker")
        await pending.cancel()
        block_ids = await fetch.leftovers()
        await self._parts.thread.call(self._parts.engine.release_reservation, pending.request, block_ids)
