"""The decode worker's service: owns each request from the router's order to its last token.

`stages.py` says what becomes of a request, whatever happens; here it happens. `_tell` is the only place that acts on
it, and `_end` the only one that sends an output with a finish reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from tandem.v1 import worker_pb2 as pb

from services.decode.admission import Admission
from services.decode.budget_keeper import BudgetKeeper
from services.decode.config import DecodeConfig
from services.decode.endings import error_of, error_output, log_end, log_refusal
from services.decode.in_engine import InEngine
from services.decode.live import LiveRequest
from services.decode.moving import Departures
from services.decode.news import News
from services.decode.session import RouterSession, SessionOverflow
from services.decode.stages import LiveAction, LiveEvent
from services.decode.token_lists import TokenLists
from services.engine.api import InvalidRequest, QueueFull, Request, StepOutput, Suspended
from services.lifecycle import Event, Timeline
from services.logs import request_scope
from services.orders import BUDGETS, OrderServer, StreamRefused
from services.worker import convert
from services.worker.assembly import WorkerParts
from services.worker.engine_thread import EngineCrashed
from services.worker.metrics import Refusal

log = logging.getLogger(__name__)

# A router says who it is right after connecting.
_HELLO_TIMEOUT_S = 10.0
PROTOCOL_VERSION = "2"  # 2: tokens in columns

_REFUSALS: Mapping[int, Refusal] = {
    pb.ERROR_CODE_INTERNAL: "protocol",
    pb.ERROR_CODE_UNAVAILABLE: "draining",
    pb.ERROR_CODE_OVERLOADED: "full",
}


class DecodeService:
    """Serves one decode worker."""

    def __init__(self, config: DecodeConfig, parts: WorkerParts, budgets: BudgetKeeper | None = None) -> None:
        """`budgets`: an elastic worker's, which routers may change."""
        self._config = config
        self._parts = parts
        self._budgets = budgets
        self._clock = parts.clock
        self._loop = asyncio.get_running_loop()
        self._in_engine = InEngine(parts, self._left_engine, self._deliver)
        self._admission = Admission(config, parts, self._in_engine.enter, self._deliver)
        self._departures = Departures(parts)
        self._sessions: dict[RouterSession, dict[int, LiveRequest]] = {}  # live requests by handle
        self._session_numbers = itertools.count(1)
        self._num_admitting = 0
        self._draining = False
        self._stuck = ""
        self._idle = asyncio.Event()
        self._idle.set()
        parts.metrics.watch_service(lambda: self._num_admitting, lambda: self._draining)

    def register(self, server: OrderServer) -> None:
        server.serve_sessions(self.serve_session)

    # ---- sessions ---------------------------------------------------------

    async def serve_session(
        self, orders: AsyncIterator[pb.SessionRequest], send: Callable[[pb.SessionFrame], Awaitable[None]]
    ) -> None:
        """Serve one router for as long as its stream lasts; see worker.proto."""
        first = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(orders, None)
        if first is None or first.WhichOneof("kind") != "hello":
            raise StreamRefused("invalid", "a session starts with `hello`")
        version = first.hello.protocol_version
        if version != PROTOCOL_VERSION:
            message = f"session protocol {version!r}; this decode worker speaks {PROTOCOL_VERSION!r}"
            raise StreamRefused("incompatible", message)
        session = RouterSession(
            first.hello.router_id,
            next(self._session_numbers),
            self._parts.incarnation,
            self._load,
            lambda: self._parts.rates.rates,
            first.hello.heartbeat_s,
            self._stuck,
            (BUDGETS,) if self._budgets is not None and self._budgets.may_change else (),
        )
        self._sessions[session] = {}
        reader = asyncio.create_task(self._read_orders(session, orders), name=f"session-{session.router_id}")
        try:
            await session.send_frames(send)
        except SessionOverflow as error:
            raise StreamRefused("overrun", str(error)) from error
        finally:
            reader.cancel()
            for live in list(self._sessions[session].values()):
                self._abort(live, "the router's session ended")
            del self._sessions[session]
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read_orders(self, session: RouterSession, orders: AsyncIterator[pb.SessionRequest]) -> None:
        try:
            async for order in orders:
                kind = order.WhichOneof("kind")
                if kind == "generate":
                    self._start(session, order.generate)
                elif kind == "abort":
                    live = self._sessions[session].get(order.abort.handle)
                    if live is not None:  # else its last output is on the way
                        self._abort(live, order.abort.reason)
                elif kind == "move":
                    live = self._sessions[session].get(order.move.handle)
                    if live is not None:
                        self._tell(live, LiveEvent.MOVE_ASKED)
                elif kind == "redirect":
                    self._redirect(session, order.redirect)
                elif kind == "budgets" and self._budgets is not None:
                    self._budgets.take(order.budgets)
                elif kind == "lists":
                    session.lists[order.lists.number] = TokenLists(order.lists.sampling)
                elif kind == "forget":
                    session.lists.pop(order.forget.number, None)
                else:
                    log.error("router %s sent %s in mid-session; ending the session", session.router_id, kind)
                    return
        finally:
            session.close()

    def _redirect(self, session: RouterSession, redirect: pb.RedirectRequest) -> None:
        """Have a prompt computed elsewhere, or here, if that makes a difference still."""
        live = self._sessions[session].get(redirect.handle)
        if live is None or self._config.colocated or live.course.wants_no_change(redirect, self._parts.worker_id):
            return
        live.course.asked = redirect
        self._tell(live, LiveEvent.REDIRECT_ASKED)

    def _start(self, session: RouterSession, order: pb.GenerateRequest) -> None:
        refusal = self._refusal(session, order)
        if refusal is not None:
            session.push(error_output(order.handle, refusal))
            is_stuck = self._stuck and refusal.code == pb.ERROR_CODE_UNAVAILABLE
            self._parts.metrics.refused("stuck" if is_stuck else _REFUSALS[refusal.code])
            log_refusal(order, refusal.code)
            return
        timeline = Timeline(self._clock)
        timeline.mark(Event.RECEIVED)
        try:
            sampling, lists = convert.sampling_from_proto(order.sampling), session.lists.get(order.token_lists)
            if lists is not None:
                sampling = lists.params(sampling)
            live = LiveRequest(order, sampling, session, timeline, convert.tpot_from_proto(order), lists)
        except InvalidRequest as error:
            session.push(error_output(order.handle, error_of(pb.ERROR_CODE_INVALID, str(error))))
            self._parts.metrics.refused("invalid")
            log_refusal(order, pb.ERROR_CODE_INVALID)
            return
        self._sessions[session][order.handle] = live
        self._idle.clear()
        self._begin_admission(live)
        if order.timeout_s > 0:
            live.timeout = self._loop.call_later(order.timeout_s, self._expire, live)

    def _refusal(self, session: RouterSession, order: pb.GenerateRequest) -> pb.Error | None:
        worker = self._parts.worker_id
        if order.handle in self._sessions[session]:
            return error_of(pb.ERROR_CODE_INTERNAL, f"handle {order.handle} is in use in this session")
        if order.token_lists and order.token_lists not in session.lists:
            return error_of(pb.ERROR_CODE_INTERNAL, f"no token lists {order.token_lists} came in this session")
        if self._draining and not order.resumed_token_ids:
            return error_of(pb.ERROR_CODE_UNAVAILABLE, f"decode worker {worker} is draining")
        if self._stuck:
            return error_of(pb.ERROR_CODE_UNAVAILABLE, f"decode worker {worker} makes no progress: {self._stuck}")
        limit = self._config.max_num_waiting + self._parts.engine.capabilities.max_num_seqs
        if self._num_live >= limit or self._parts.thread.is_behind:
            return error_of(pb.ERROR_CODE_OVERLOADED, f"decode worker {worker} has {self._num_live} live requests")
        return None

    # ---- one request ------------------------------------------------------

    def _begin_admission(self, live: LiveRequest) -> None:
        live.admission = asyncio.create_task(self._admit(live), name=f"admit-{live.order.request_id}")

    async def _admit(self, live: LiveRequest) -> None:
        with request_scope(live.order.request_id):
            await self._bring_in(live)

    async def _bring_in(self, live: LiveRequest) -> None:
        self._num_admitting += 1
        error: pb.Error | None = error_of(pb.ERROR_CODE_INTERNAL, "its admission was cancelled, as nobody had ordered")
        try:
            await self._admission.admit(live)
            error = None
        except InvalidRequest as refusal:
            self._parts.metrics.refused("invalid")
            error = error_of(pb.ERROR_CODE_INVALID, str(refusal))
        except QueueFull as refusal:
            self._parts.metrics.refused("full")
            error = error_of(pb.ERROR_CODE_OVERLOADED, str(refusal))
        except EngineCrashed as crash:
            message = f"the engine of {self._parts.worker_id} stopped: {crash}"
            error = error_of(pb.ERROR_CODE_UNAVAILABLE, message)
        except Exception as failure:
            log.exception("admission failed")
            error = error_of(pb.ERROR_CODE_INTERNAL, f"{type(failure).__name__}: {failure}")
        finally:
            self._num_admitting -= 1
            if error is None:
                self._tell(live, LiveEvent.ADMITTED)
                if live.course.is_late:
                    self._tell(live, LiveEvent.REDIRECT_ASKED)
            else:
                self._tell(live, LiveEvent.NOT_ADMITTED, error_output(live.order.handle, error))

    def _abort(self, live: LiveRequest, reason: str) -> None:
        log.debug("aborted: %s", reason, extra={"request_id": live.order.request_id})
        output = pb.Output(handle=live.order.handle, finish_reason=pb.FINISH_REASON_ABORT)
        self._tell(live, LiveEvent.ABORTED, output)

    def _expire(self, live: LiveRequest) -> None:
        message = f"no end after {live.order.timeout_s:g} s; stage: {live.states.state.value}"
        output = error_output(live.order.handle, error_of(pb.ERROR_CODE_DEADLINE, message))
        self._tell(live, LiveEvent.EXPIRED, output)

    def _close_all(self, why: str) -> None:
        """End all requests: another worker should go on with them."""
        for lives in list(self._sessions.values()):
            for live in list(lives.values()):
                error = error_of(pb.ERROR_CODE_UNAVAILABLE, f"decode worker {self._parts.worker_id} {why}")
                self._tell(live, LiveEvent.CLOSED, error_output(live.order.handle, error))

    def _left_engine(self, live: LiveRequest, event: LiveEvent, left: Suspended | None) -> None:
        self._tell(live, event, left=left)

    def _deliver(self, news: Sequence[News]) -> None:
        for each in news:
            live = each.live
            try:
                self._tell(live, LiveEvent.LAST if each.is_last else LiveEvent.TOKENS, each.output, each)
            except Exception as failure:
                # It ends this request. The others of the step must not lose a token by it.
                log.exception("an output could not be sent", extra={"request_id": live.order.request_id})
                error = error_of(pb.ERROR_CODE_INTERNAL, f"{type(failure).__name__}: {failure}")
                self._tell(live, LiveEvent.BROKEN, error_output(live.order.handle, error))

    def _tell(
        self,
        live: LiveRequest,
        event: LiveEvent,
        output: pb.Output | None = None,
        news: News | None = None,
        left: Suspended | None = None,
    ) -> None:
        """Do what an event leads to. `output`: the last one, if it leads to the end; `left`: what the engine let go."""
        for action in live.states.move(event):
            match action:
                case LiveAction.SAY:
                    assert news is not None
                    self._say(news)
                case LiveAction.CANCEL:
                    assert live.admission is not None
                    live.admission.cancel()
                case LiveAction.DROP:
                    # After whatever the admission task has sent to the engine thread: commands run in order.
                    self._parts.thread.post(self._in_engine.drop, live)
                case LiveAction.SUSPEND:
                    live.leaves_under = live.leaves_under or self._parts.exchange.new_id()
                    self._parts.thread.post(self._in_engine.let_go, live)
                case LiveAction.AIM:
                    live.course.aim(live.order, self._parts.worker_id)
                case LiveAction.RETRACT:
                    self._parts.thread.post(self._in_engine.give_up, live)
                case LiveAction.ADMIT:
                    self._admission.prepare_anew(live)
                    self._begin_admission(live)
                case LiveAction.KEEP:
                    assert left is not None
                    output = self._departures.keep(live, left)
                case LiveAction.FREE:
                    assert left is not None
                    self._departures.free(left)
                case LiveAction.END:
                    assert output is not None
                    self._end(live, output, news)

    def _say(self, news: News) -> None:
        live, token_id, output, *_ = news
        if output is None:
            live.usage.num_generated_tokens += 1
            self._stamp_token(live)
            live.session.push_token(live.order.handle, token_id)
        else:
            self._count(news, output)
            live.session.push(output)

    def _end(self, live: LiveRequest, output: pb.Output, news: News | None) -> None:
        """Forget it, and send its last output; whatever fails, one goes out."""
        lives = self._sessions[live.session]
        del lives[live.order.handle]
        if not self._num_live:
            self._idle.set()
        if live.timeout is not None:
            live.timeout.cancel()
        try:
            if news is not None:
                self._count(news, output)
            live.timeline.mark(Event.FINISHED)
            output.usage.CopyFrom(live.usage)
            output.stamps.extend(convert.stamps_to_proto(live.timeline))
        except Exception as failure:
            log.exception("a last output could not be made", extra={"request_id": live.order.request_id})
            error = error_of(pb.ERROR_CODE_INTERNAL, f"{type(failure).__name__}: {failure}")
            output = error_output(live.order.handle, error)
        live.session.push(output)
        self._parts.metrics.finished(live.timeline, live.usage, output.finish_reason)
        log_end(live, output)

    def _count(self, news: News, output: pb.Output) -> None:
        live, usage = news.live, news.live.usage
        usage.num_generated_tokens += len(output.token_ids)
        usage.num_recomputes += news.num_recomputes
        self._parts.metrics.recomputed("preemption", news.num_recomputes)
        if usage.prefilled_locally:
            num_cached = news.num_cached_tokens - live.course.num_computed_blocks * self._parts.engine.layout.block_size
            usage.num_cached_tokens = max(usage.num_cached_tokens, num_cached)
        if output.token_ids and self._stamp_token(live):
            if live.said_elsewhere is not None:
                self._compare(live, live.said_elsewhere, output)
            output.usage.CopyFrom(usage)

    def _compare(self, live: LiveRequest, elsewhere: pb.PrefillFinished, output: pb.Output) -> None:
        """Note whether the first token is the one that the prefill worker found; what that said of the prompt holds."""
        live.usage.first_token_equal = output.token_ids[0] == elsewhere.token_id
        self._parts.metrics.first_token_compared(live.usage.first_token_equal)
        output.prompt_logprobs.extend(elsewhere.prompt_logprobs)

    def _stamp_token(self, live: LiveRequest) -> bool:
        """Note when a token went out; whether it was the first."""
        now_s, before_s = self._clock(), live.newest_token_s
        live.newest_token_s = now_s
        if before_s is not None:
            self._parts.metrics.next_token(now_s - before_s)
            return False
        live.timeline.unix_s[Event.FIRST_TOKEN] = now_s
        self._parts.metrics.first_token(live.timeline)
        return True

    # ---- engine thread ----------------------------------------------------

    def on_begun(self, request: Request) -> None:
        """Do nothing: the router hears of a request with its first token."""

    def on_step(self, output: StepOutput) -> None:
        self._in_engine.on_step(output)

    # ---- the process ------------------------------------------------------

    @property
    def _num_live(self) -> int:
        return sum(map(len, self._sessions.values()))

    def _load(self) -> pb.Load:
        load = convert.load_to_proto(self._parts.engine.load(), self._num_admitting, self._draining)
        if self._budgets is not None:
            load.budgets.CopyFrom(self._budgets.said())
        return load

    def state(self) -> dict[str, object]:
        return {
            "sessions": [session.router_id for session in self._sessions],
            "live": self._num_live,
            "admitting": self._num_admitting,
            "kept": len(self._departures),
            "draining": self._draining,
        }

    def set_stuck(self, stuck: str) -> None:
        self._stuck = stuck
        for session in self._sessions:
            session.set_stuck(stuck)

    def begin_drain(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        self.begin_drain()
        try:
            async with asyncio.timeout(timeout_s):
                while self._num_live or self._departures:  # one that has left comes back where all others drain, too
                    await self._idle.wait()
                    await self._departures.ended()
        except TimeoutError:
            text = "still %d live requests, and %d kept for others, after %g s of draining"
            log.warning(text, self._num_live, len(self._departures), timeout_s)
            self._close_all(f"drains, and {timeout_s:g} s were all the time that it had")

    async def close(self) -> None:
        self._draining = True
        self._close_all("is shutting down")
        for session in self._sessions:
            session.close()

    async def settle(self) -> None:
        await self._admission.close()
        await self._departures.settled()
