"""Keeps one bidirectional gRPC stream per decode or elastic worker: orders go down, frames with tokens come up.

The session reconnects by itself. It hands each output to whoever submitted the request, at once and without waiting
(`OutputSink.deliver` only stores), so that one slow client never holds up the others. When the stream ends, however it
does, every request on it is lost.

A worker promises a frame at least every so often. One that is silent for too long, since it hangs or is cut off, or
says that a part of it stands still, is left: its stream ends.

A request may be what its worker died of, or what its step loop hangs in, so it is told of that (`OutputSink.lose`).
A worker that is left for its silence is no such case, nor one that we lost while our own loop stood still, nor, as it
turns out later, one that answers again (`num_streams`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable

from tandem.v1 import worker_pb2 as pb

from kvstore.registry import WorkerRecord
from services.budgets import UNBOUND, Budgets, Role
from services.orders import LISTS, MOVES, REDIRECTS, RESUMES, Orders, StreamBroken, budgets_to_proto, is_cancelled
from services.rates import GUESSED
from services.router.fleet.silence import Silence
from services.router.fleet.sink import OutputSink
from services.router.fleet.token_lists import ToldLists
from services.router.fleet.worker_load import budgets_from_proto, rates_from_proto, role_from_proto

log = logging.getLogger(__name__)

PROTOCOL_VERSION = "2"  # 2: tokens in columns
HELLO_TIMEOUT_S = 4.0
MAX_OUTBOX_BYTES = 64 << 20
"""Of orders that the connection has not taken yet. Who has several waits from a part of that on."""
_DRAINED_BYTES = 8 << 20
_FIRST_BACKOFF_S = 0.1
# Requests that leave a draining worker at a time: the room that each takes elsewhere is counted when it has come there.
_MAX_LEAVING = 4
# Of a frame, so many are delivered before others are served: that takes a millisecond or two.
_TOKENS_AT_ONCE = 32
_STEP_LOOP = "step loop"
"""As workers name the part that computes requests."""
_STAY_S = 0.25  # until one that found no room elsewhere is looked at again


class _StandsStill(StreamBroken):
    """The worker may live, and is of no use: it says nothing, or that it gets on no more, for no request's fault."""


class SessionDown(Exception):
    """The worker cannot be reached now."""


class SessionFull(Exception):
    """The worker does not read its orders as fast as they come."""


def _check_progress(frame: pb.SessionFrame) -> None:
    if frame.stuck:
        kind = StreamBroken if _STEP_LOOP in frame.stuck else _StandsStill
        raise kind(f"the worker makes no progress: {frame.stuck}")


class WorkerSession:
    """The session with one incarnation of one decode worker. `run()` is its life, a task that its owner awaits."""

    def __init__(
        self,
        record: WorkerRecord,
        router_id: str,
        orders: Orders,
        reconnect_max_s: float,
        silence: Silence,
        on_load: Callable[[], None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_load`: called when its load is news, as with its first frame, or when it is lost; `on_change`: also when
        what stands in front of a new request there is another number, or it has become suspect, or is not any more."""
        self.record = record
        self._on_load = on_load
        self._on_change = on_change
        self._was_suspect = False
        self.connected = False
        self.num_streams = 0
        """That have begun: one more later, and this incarnation had not died."""
        self.features: frozenset[str] = frozenset()
        """What the worker understands beyond the protocol's version."""
        self.load = pb.Load()
        self.rates = GUESSED
        self.role: Role = "decode"
        """Of an elastic worker, as it last said: which work it is given first."""
        self.budgets = UNBOUND
        self._router_id = router_id
        self._orders = orders
        self._reconnect_max_s = reconnect_max_s
        self._live: dict[int, OutputSink] = {}
        self._lists = ToldLists(self._send)
        self._last_handle = 0
        self._num_sent_since_load = 0
        self._num_tokens_since_load = 0
        self._leaving: set[int] = set()  # told to go on elsewhere, and not ended yet
        self._look_s = 0.0  # when to look next for who may leave, by the loop's clock
        self._outbox: deque[tuple[pb.SessionRequest, int]] = deque()
        self._outbox_bytes = 0
        self._outbox_filled = asyncio.Event()
        self._outbox_drained = asyncio.Event()
        self._outbox_drained.set()
        self._closing = asyncio.Event()
        self._silence = silence

    @property
    def is_suspect(self) -> bool:
        """Whether the worker should have said something by now: others are preferred, until it does."""
        return self.connected and self._silence.is_suspect(asyncio.get_running_loop().time())

    @property
    def silent_s(self) -> float:
        """Seconds since the worker's last frame."""
        return self._silence.silent_s(asyncio.get_running_loop().time())

    @property
    def num_live(self) -> int:
        """Requests of this router that the worker has not ended."""
        return len(self._live)

    @property
    def num_outstanding(self) -> int:
        """Requests in front of a new one.

        The worker's load counts all routers' requests but is a step old, so what was sent since is added; it may also
        have been taken before our latest orders were read, so it is never less than our own.
        """
        return max(self.num_live, self.load.num_running + self.load.num_waiting + self._num_sent_since_load)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a new request could have: as last reported, less what was sent since. Evictable ones count."""
        num_taken = -(-self._num_tokens_since_load // self.record.block_size)
        return max(self.load.num_free_blocks - num_taken, 0)

    def submit(self, message: pb.SessionRequest, sink: OutputSink, lists: pb.SamplingParams | None) -> int:
        """Sends the order in `message`; returns the handle that names it here. Raises SessionDown, SessionFull.

        `lists`: those of tokens that it goes by and does not have itself; to a worker with that feature only.
        """
        if not self.connected:
            raise SessionDown(f"decode worker {self.record.worker_id} is not connected")
        if self._outbox_bytes >= MAX_OUTBOX_BYTES:
            raise SessionFull(f"{self._outbox_bytes} bytes of orders wait for decode worker {self.record.worker_id}")
        handle = self._next_handle()
        message.generate.handle = handle
        if lists is not None:
            message.generate.token_lists = self._lists.use(handle, lists)
        self._live[handle] = sink
        self._num_sent_since_load += 1
        self._num_tokens_since_load += len(message.generate.prompt_token_ids) + len(message.generate.resumed_token_ids)
        self._on_change()
        self._send(message)
        return handle

    def redirect(self, handle: int, message: pb.RedirectRequest) -> bool:
        """Has a request's prompt computed elsewhere; False: it has ended, or the worker does not do that."""
        if handle not in self._live or REDIRECTS not in self.features:
            return False
        message.handle = handle
        self._send(pb.SessionRequest(redirect=message))
        return True

    def abort(self, handle: int, reason: str) -> None:
        """Ends the request at the worker; nothing of it is delivered any more. No-op if it has ended."""
        if self._live.pop(handle, None) is not None:
            self._leaving.discard(handle)
            self._forget_one_sent()
            self._send(pb.SessionRequest(abort=pb.AbortRequest(handle=handle, reason=reason)))
            self._lists.ended(handle)

    def bend(self, role: Role, budgets: Budgets) -> None:
        """Tell an elastic worker what to do first, and what its streams may bear. It has done so once its frames say
        it. Raises SessionDown."""
        if not self.connected:
            raise SessionDown(f"worker {self.record.worker_id} is not connected")
        self._send(pb.SessionRequest(budgets=budgets_to_proto(role, budgets)))

    async def drained(self) -> None:
        """Returns once few orders are on their way, or the session is lost."""
        await self._outbox_drained.wait()

    async def run(self) -> None:
        """Connects, serves, reconnects after a pause that doubles up to the limit, until `close`."""
        try:
            await self._run()
        finally:
            # Cancelled by its owner, or broken: nobody shall wait for what does not come any more.
            if self._live or self._outbox:
                self._lose("the router has given it up", died=False)

    async def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._closing.is_set():
            died = True
            try:
                await self._run_stream()
                reason = "closed"
            except StreamBroken as error:
                was_blind = self._silence.was_blind(asyncio.get_running_loop().time())
                reason, died = str(error), not (was_blind or isinstance(error, _StandsStill))
            except TimeoutError:
                reason = f"no first frame within {HELLO_TIMEOUT_S:g} s"
            except (Exception, asyncio.CancelledError) as error:
                if is_cancelled():
                    raise
                # A bug of ours must not cost the router this worker for ever.
                log.exception("the session with decode worker %s crashed", self.record.worker_id)
                reason = f"the router failed: {error!r}"
            if self.connected:
                backoff_s = _FIRST_BACKOFF_S
            self._lose(reason, died)
            if not self._closing.is_set():
                # Jitter, so that several routers do not dial a restarted worker in step.
                pause_s = backoff_s * random.uniform(0.5, 1.0)
                backoff_s = min(backoff_s * 2, self._reconnect_max_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._closing.wait()

    def close(self) -> None:
        """Makes `run` return soon; the worker aborts what is still running here."""
        self._closing.set()

    # ---- one stream ---------------------------------------------------------

    async def _run_stream(self) -> None:
        async with contextlib.aclosing(self._orders.session(self.record.grpc_address, self._requests())) as frames:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(frames, None)
            await self._on_first_frame(first)
            reading = asyncio.create_task(self._read_frames(frames), name=f"frames from {self.record.worker_id}")
            closing = asyncio.create_task(self._closing.wait(), name=f"close of {self.record.worker_id}")
            listening = asyncio.create_task(self._listen(), name=f"silence of {self.record.worker_id}")
            try:
                await asyncio.wait([reading, closing, listening], return_when=asyncio.FIRST_COMPLETED)
            finally:
                closing.cancel()
                listening.cancel()
                if reading.cancel():
                    await asyncio.wait([reading])
            for each in (reading, listening):
                if each.done() and not each.cancelled():
                    each.result()

    async def _listen(self) -> None:
        """Raise StreamBroken once the worker has been silent for too long."""
        while True:
            await asyncio.sleep(self._silence.look_s)
            self._silence.look(asyncio.get_running_loop().time())
            if self.is_suspect != self._was_suspect:
                self._was_suspect = not self._was_suspect
                self._on_change()
            if self._silence.is_broken:
                raise _StandsStill(f"silent for more than {self._silence.timeout_s:g} s")

    async def _requests(self) -> AsyncIterator[pb.SessionRequest]:
        yield pb.SessionRequest(
            hello=pb.SessionHello(
                router_id=self._router_id,
                protocol_version=PROTOCOL_VERSION,
                heartbeat_s=self._silence.heartbeat_s,
                features=[RESUMES, MOVES, LISTS],
            )
        )
        while True:
            await self._outbox_filled.wait()
            while self._outbox:
                message, num_bytes = self._outbox.popleft()
                self._count_outbox(-num_bytes)
                yield message
            self._outbox_filled.clear()

    async def _on_first_frame(self, frame: pb.SessionFrame | None) -> None:
        if frame is None:
            raise StreamBroken("the worker ended the session before its first frame")
        if frame.incarnation != self.record.incarnation:
            raise StreamBroken(
                f"{self.record.grpc_address} answers as incarnation {frame.incarnation!r}, "
                f"registered is {self.record.incarnation!r}"
            )
        _check_progress(frame)
        self._silence.begin(asyncio.get_running_loop().time(), is_promised=frame.heartbeat_s > 0)
        self.connected = True
        self.num_streams += 1
        self.features = frozenset(frame.features)
        self._on_change()
        log.debug("session with decode worker %s is up", self.record.worker_id)
        await self._on_frame(frame)

    async def _read_frames(self, frames: AsyncIterator[pb.SessionFrame]) -> None:
        async for frame in frames:
            await self._on_frame(frame)
        raise StreamBroken("the worker ended the session")

    async def _on_frame(self, frame: pb.SessionFrame) -> None:
        _check_progress(frame)
        self._silence.heard(asyncio.get_running_loop().time())
        if self._was_suspect:
            self._was_suspect = False
            self._on_change()
        if frame.HasField("load"):
            self.load = frame.load
            if frame.load.HasField("rates"):
                self.rates = rates_from_proto(frame.load.rates)
            if frame.load.HasField("budgets"):
                self.role = role_from_proto(frame.load.budgets, self.role)
                self.budgets = budgets_from_proto(frame.load.budgets)
            self._num_sent_since_load = 0
            self._num_tokens_since_load = 0
        ended = []
        for output in frame.outputs:
            if output.finish_reason:
                ended.append(output)
            elif (sink := self._live.get(output.handle)) is not None:
                sink.deliver(output)
        if len(frame.handles) != len(frame.token_ids):
            raise StreamBroken(f"a frame with {len(frame.handles)} handles for {len(frame.token_ids)} tokens")
        handles = list(frame.handles)
        num_tokens = Counter(handles) if len(set(handles)) < len(handles) else None
        for number, (handle, token_id) in enumerate(zip(handles, frame.token_ids, strict=True), start=1):
            if number % _TOKENS_AT_ONCE == 0:
                await asyncio.sleep(0)
            # What comes for a request that we aborted meanwhile has nobody waiting for it.
            if (sink := self._live.get(handle)) is not None:
                sink.deliver_token(token_id, num_tokens is None or num_tokens[handle] == 1)
        for output in ended:
            if (sink := self._live.pop(output.handle, None)) is not None:
                self._leaving.discard(output.handle)
                self._lists.ended(output.handle)
                self._forget_one_sent()
                sink.deliver(output)
        if frame.HasField("load"):
            self._on_change()
            self._on_load()
        if self.load.draining and MOVES in self.features:
            self._let_leave()

    def _let_leave(self) -> None:
        """Tell a draining worker which requests go on elsewhere: some at a time, as long as there is room for them."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._look_s:
            return
        for handle, sink in list(self._live.items()):
            if len(self._leaving) >= _MAX_LEAVING:
                return
            if handle in self._leaving:
                continue
            if sink.may_leave():
                self._leaving.add(handle)
                self._send(pb.SessionRequest(move=pb.MoveRequest(handle=handle)))
            else:
                self._look_s = now_s + _STAY_S

    def _forget_one_sent(self) -> None:
        # It has ended, so it stands in front of nobody, whether or not a load has counted it yet.
        self._num_sent_since_load = max(self._num_sent_since_load - 1, 0)
        self._on_change()

    def _lose(self, reason: str, died: bool) -> None:
        if self._closing.is_set():
            log.debug("session with decode worker %s is closed", self.record.worker_id)
        elif self.connected:
            log.warning(
                "session with decode worker %s lost with %d requests: %s", self.record.worker_id, self.num_live, reason
            )
        else:
            log.debug("decode worker %s cannot be reached: %s", self.record.worker_id, reason)
        self.connected = False
        self._outbox.clear()
        self._count_outbox(-self._outbox_bytes)
        self._outbox_filled.clear()
        self._num_sent_since_load = 0
        self._num_tokens_since_load = 0
        self.load = pb.Load()
        self._leaving.clear()
        self._lists.clear()
        lost, self._live = self._live, {}
        self._on_change()
        for sink in lost.values():
            sink.lose(reason, died)
        self._on_load()

    def _send(self, message: pb.SessionRequest) -> None:
        num_bytes = message.ByteSize()
        self._outbox.append((message, num_bytes))
        self._count_outbox(num_bytes)
        self._outbox_filled.set()

    def _count_outbox(self, num_bytes: int) -> None:
        self._outbox_bytes += num_bytes
        if self._outbox_bytes > _DRAINED_BYTES:
            self._outbox_drained.clear()
        else:
            self._outbox_drained.set()

    def _next_handle(self) -> int:
        while True:
            self._last_handle = self._last_handle % 0xFFFFFFFF + 1
            if self._last_handle not in self._live:
                return self._last_handle
