"""Sends blocks as two-sided tagged messages of UCX, by its Python binding ucxx: works wherever TCP does.

The reader asks over the control connection; once the owner grants the read, both post the same messages, one per run of
neighbouring blocks: the owner sends, the reader receives straight into its pool. Whose blocks are in pieces gathers and
scatters them (`staging.py`), which the other end need not know.

Error handling makes UCX carry the endpoint over tcp even on one host. Without it UCX would use cma, five times as fast,
but an abort must leave no posted receive behind. Where cma works, the nixl transport uses it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from kvstore.block import BlockMemory, Run
from kvstore.errors import ReadFailed, TransportError
from kvstore.transport import ucxx_introduction, ucxx_progress
from kvstore.transport.base import LinkPeer
from kvstore.transport.buffers import check_inside, is_one_buffer, region
from kvstore.transport.devices import narrow
from kvstore.transport.staging import Arrivals, Buffers, Room
from kvstore.transport.ucxx_introduction import hold

if TYPE_CHECKING:
    from ucxx import Endpoint, Listener

logger = logging.getLogger(__name__)

# Messages posted and not done, per link and direction. Thousands hang UCX; 64 keep tcp busy.
_MAX_POSTED: Final = 64
_LINK_ID_TAG: Final = 0
_LINK_ID_BYTES: Final = 16
# An endpoint that has introduced itself waits so long for the control connection's word, and the other way round.
_INTRODUCTION_S: Final = 5.0
# How long `Endpoint.abort` waits for UCX's thread to close the endpoint, once what is posted on it is cancelled. There
# is no second try: the endpoint counts as closed, and its sockets stay open at both ends until the other one closes it.
_ABORT_PERIOD_NS: Final = 1_000_000_000
_MAX_CLOSE_S: Final = 5.0
_MAX_ARRIVALS: Final = 256
_PING_TAG: Final = 0x7A11_5E1F_7A11_5E1F
_PING_S: Final = 0.25
# Where no word to ourselves has come for so long, UCX's thread hangs, or nearly.
_LATE_S: Final = 1.0
_RUN_BITS: Final = 16


class _Descriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    port: int


def import_ucxx() -> tuple[ModuleType, dict[str, str]]:
    """Import ucxx with the settings that it needs in the environment; the user's own win.

    Returns the module and its context's options: ucxx puts rendezvous settings into the environment, with which nixl's
    UCX would read over cma at a fifth of its speed (measured), so they are taken out again. Raises `TransportError`.
    """
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # nixl's UCX has settings that this one does not know
    os.environ.setdefault("UCX_TCP_CM_REUSEADDR", "y")
    os.environ.setdefault("UCXX_LOG_LEVEL", "ERROR")  # a busy loop makes it warn of futures made late, on stdout
    users_own = set(os.environ)
    try:
        import ucxx
    except (ImportError, OSError) as error:
        raise TransportError(f"ucxx cannot be loaded: {error}") from error
    added = [name for name in os.environ if name.startswith("UCX_RNDV_") and name not in users_own]
    options = {name.removeprefix("UCX_"): os.environ.pop(name) for name in added}
    module: ModuleType = ucxx
    ucxx_introduction.mend(module)
    ucxx_progress.mend(module)
    return module, options


class UcxxTransport:
    """One per process: ucxx has one context per process, which lives in the loop that started it."""

    name = "ucxx"
    two_sided = True
    is_still = False
    num_turns: int | None = None
    """Messages to ourselves that have come: through the library's threads and back."""

    def __init__(self, memory: BlockMemory, host: str) -> None:
        self._host = host
        self._ucxx, self._options = import_ucxx()
        self._error: type[Exception] = self._ucxx.exceptions.UCXError
        self._memory = memory
        self._buffers = None if is_one_buffer(memory) else Buffers(memory)
        self._is_running = False
        self._came_s: float | None = None  # when a message to ourselves came last; None: none is sent
        self._unaborted: list[Endpoint] = []
        self._pinging: asyncio.Task[None] | None = None
        self._listener: Listener | None = None
        self._links: set[UcxxLink] = set()
        # The owner's end of links to be, by link id. The endpoint comes from the listener, the wish for it from the
        # handshake, in either order.
        self._arrivals: dict[bytes, asyncio.Future[Endpoint]] = {}

    async def start(self) -> None:
        """Start UCX's progress thread and listen on a free port of `host`."""
        try:
            self._ucxx.init(self._options, progress_mode="thread", enable_python_future=True)
            self._is_running = True
            self._listener = self._ucxx.create_listener(self._on_endpoint)
            narrow(self._listener.port, self._host)  # ucxx listens on all addresses
        except (RuntimeError, self._error) as error:
            raise TransportError(f"UCX cannot start: {error}; see UCX_TLS, and `tandem doctor`") from error
        self.num_turns = 0
        self._pinging = asyncio.create_task(self._ping(), name="ucxx to itself")

    def abort(self, endpoint: Endpoint) -> None:
        """End an endpoint, and all that is posted on it: now, or once UCX's thread gets on.

        Where that hangs, to abort would hold up the loop for more than ten seconds (measured), and come to nothing.
        """
        now_s = asyncio.get_running_loop().time()
        if self._came_s is not None and now_s - self._came_s > _LATE_S:
            self._unaborted.append(endpoint)
        else:
            endpoint.abort(_ABORT_PERIOD_NS)

    def _make_up(self) -> None:
        """Abort what waits for that."""
        unaborted, self._unaborted = self._unaborted, []
        for endpoint in unaborted:
            endpoint.abort(_ABORT_PERIOD_NS)

    async def _ping(self) -> None:
        """Send ourselves a word every now and then, through all of the library's threads."""
        try:
            endpoint = await self._ucxx.create_endpoint_from_worker_address(self._ucxx.get_worker_address())
            word, loop = bytearray(1), asyncio.get_running_loop()
            self._came_s = loop.time()
            while self._is_running:
                sending = endpoint.send(word, tag=_PING_TAG, force_tag=True)
                await asyncio.gather(sending, self._ucxx.recv(bytearray(1), tag=_PING_TAG))
                self.num_turns, self._came_s = (self.num_turns or 0) + 1, loop.time()
                self._make_up()
                await asyncio.sleep(_PING_S)
        except Exception as error:  # whatever it is: who is not watched any more is not to be taken for hung
            self.num_turns = None
            if self._is_running:
                logger.error("ucxx: nobody watches UCX's thread any more: %r", error)
        self._came_s = None
        self._make_up()

    def descriptor(self) -> bytes:
        """The listener's port; the host is the control connection's."""
        if self._listener is None:
            raise TransportError("ucxx: not started")
        return msgspec.msgpack.encode(_Descriptor(self._listener.port))

    def lane_to(self, descriptor: bytes) -> str | None:
        """`tcp`, to anybody."""
        try:
            msgspec.msgpack.decode(descriptor, type=_Descriptor)
        except msgspec.MsgspecError:
            return None
        return "tcp"

    def problem(self) -> str | None:
        """That it is not running: started, nothing of it breaks for good."""
        return None if self._is_running else "not running"

    async def connect(self, peer: LinkPeer) -> UcxxLink:
        """Make an endpoint to the owner's listener, or wait for the reader's to arrive at ours."""
        if peer.dialled:
            endpoint = await self._dial(peer)
        else:
            endpoint = await self._arrival(peer.link_id)
        link = UcxxLink(endpoint, self._memory, peer.peer_id, self._error, self._links, self.abort, self._buffers)
        self._links.add(link)
        return link

    async def close(self) -> None:
        """Close all links, then UCX: the process could not end otherwise."""
        await asyncio.gather(*(link.close() for link in list(self._links)))
        for link_id in list(self._arrivals):
            self._forget(link_id)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._is_running:
            self._is_running = False
            if self._pinging is not None:
                await asyncio.wait([self._pinging], timeout=_MAX_CLOSE_S)  # it ends by itself, unless it hangs
            self._ucxx.stop_notifier_thread()

    async def _dial(self, peer: LinkPeer) -> Endpoint:
        try:
            port = msgspec.msgpack.decode(peer.descriptor, type=_Descriptor).port
            endpoint = await self._ucxx.create_endpoint(peer.host, port, connect_timeout=_INTRODUCTION_S)
        except (msgspec.MsgspecError, OSError, RuntimeError, TimeoutError, self._error) as error:
            raise TransportError(f"ucxx: no endpoint to {peer.peer_id} at {peer.host}: {error!r}") from error
        # Never cancelled, as all that is posted: the endpoint's end is its end.
        sending = asyncio.ensure_future(endpoint.send(bytearray(peer.link_id), tag=_LINK_ID_TAG))
        hold(sending)
        try:
            await asyncio.shield(sending)
        except self._error as error:
            self.abort(endpoint)
            raise TransportError(f"ucxx: {peer.peer_id} dropped our endpoint: {error!r}") from error
        except asyncio.CancelledError:
            self.abort(endpoint)
            raise
        return endpoint

    async def _arrival(self, link_id: bytes) -> Endpoint:
        try:
            async with asyncio.timeout(_INTRODUCTION_S):
                return await self._arriving(link_id)
        except TimeoutError as error:
            raise TransportError(f"ucxx: the reader's endpoint did not arrive within {_INTRODUCTION_S} s") from error
        finally:
            self._arrivals.pop(link_id, None)

    async def _on_endpoint(self, endpoint: Endpoint) -> None:
        """A reader has connected; its first message says for which connection."""
        link_id = bytearray(_LINK_ID_BYTES)
        receiving = asyncio.ensure_future(endpoint.recv(link_id, tag=_LINK_ID_TAG))
        await asyncio.wait([receiving], timeout=_INTRODUCTION_S)
        known = receiving.done() and receiving.exception() is None
        if not known or self._listener is None or len(self._arrivals) >= _MAX_ARRIVALS:
            logger.warning(
                "ucxx: an endpoint was turned away (%s)", "one too many" if known else "it did not say whose"
            )
            self.abort(endpoint)  # which also ends the receive
            await asyncio.wait([receiving], timeout=_INTRODUCTION_S)
            return
        arriving = self._arriving(bytes(link_id))
        if arriving.done():
            self.abort(endpoint)  # the second of that name
            return
        arriving.set_result(endpoint)
        asyncio.get_running_loop().call_later(_INTRODUCTION_S, self._forget, bytes(link_id))

    def _arriving(self, link_id: bytes) -> asyncio.Future[Endpoint]:
        if link_id not in self._arrivals:
            self._arrivals[link_id] = asyncio.get_running_loop().create_future()
        return self._arrivals[link_id]

    def _forget(self, link_id: bytes) -> None:
        """Drop an endpoint that no connection has claimed."""
        arrival = self._arrivals.pop(link_id, None)
        if arrival is not None and not arrival.cancel() and not arrival.cancelled():
            self.abort(arrival.result())


class UcxxLink:
    """One endpoint. What is posted on it ends by itself or by `Endpoint.abort`, never by cancelling a task: a cancelled
    receive goes on behind the scenes and overwrites what has become somebody else's block."""

    lane = "tcp"

    def __init__(
        self,
        endpoint: Endpoint,
        memory: BlockMemory,
        peer_id: str,
        error: type[Exception],
        links: set[UcxxLink],
        abort: Callable[[Endpoint], None],
        buffers: Buffers | None,
    ) -> None:
        self._endpoint = endpoint
        self._memory = memory
        self._buffers = buffers
        self._room = Room()
        self._arrivals = Arrivals()
        self._peer_id = peer_id
        self._error = error
        self._links = links
        self._abort = abort
        self._dead: str | None = None
        self._slots = asyncio.Semaphore(_MAX_POSTED)
        self._posting = asyncio.Lock()
        self._under_way: set[asyncio.Task[None]] = set()
        self._num_messages = 0

    @property
    def num_messages(self) -> int:
        """Messages, and, where they come into buffers, parts of them."""
        return self._num_messages + self._arrivals.num_come

    def read(self, read_id: int, runs: Sequence[Run], landed: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """Post one receive per run."""
        wanted = [(run.local_first, run.num_blocks) for run in runs]
        return self._start(f"read {read_id}", self._post_all("recv", read_id, wanted))

    def serve(self, read_id: int, runs: Sequence[tuple[int, int]]) -> asyncio.Future[None]:
        """Post one send per run."""
        return self._start(f"serving read {read_id}", self._post_all("send", read_id, runs))

    def abort(self, reason: str) -> None:
        """Abort the endpoint; everything posted on it ends with an error."""
        if self._dead is None:
            self._dead = reason
            self._abort(self._endpoint)

    async def close(self) -> None:
        """Abort, and wait until all has ended."""
        self.abort("closed")
        if self._under_way:
            _, stuck = await asyncio.wait(self._under_way, timeout=_MAX_CLOSE_S)
            if stuck:
                # Their futures stay unresolved, and so the blocks stay in quarantine: the safe side.
                logger.error("ucxx: %d reads or sends with %s do not end after an abort", len(stuck), self._peer_id)
        self._links.discard(self)

    def _start(self, what: str, work: Coroutine[None, None, None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(self._run(what, work))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _run(self, what: str, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except (self._error, TransportError) as error:
            why = f"link aborted: {self._dead}" if self._dead is not None else repr(error)
            raise ReadFailed(f"ucxx: {what} with {self._peer_id}: {why}") from error

    async def _post_all(self, verb: Literal["send", "recv"], read_id: int, runs: Sequence[tuple[int, int]]) -> None:
        """Post all messages, in order, and return when every single one has ended. Raises the first error."""
        if len(runs) >= 1 << _RUN_BITS:
            raise TransportError(f"a read of {len(runs)} messages; {(1 << _RUN_BITS) - 1} are possible")
        for first_block, num_blocks in runs:
            check_inside(self._memory, first_block, num_blocks)
        posted: list[asyncio.Task[None]] = []
        # One read after the other: grants come in the same order at both ends, so both post the same sequence of
        # messages, and what one end has posted is a prefix of what the other has, or the other way round. Were reads
        # to mix, each end could fill its slots with what the other has no slot for.
        async with self._posting:
            for i, run in enumerate(runs):
                await self._slots.acquire()
                if self._dead is not None:
                    self._slots.release()
                    break
                if self._buffers is not None:
                    await self._room.reserve(run[1] * self._memory.block_bytes)
                tag = (read_id << _RUN_BITS | i) + 1  # 0 is the link id's
                message = asyncio.ensure_future(self._move(verb, run, tag))
                message.add_done_callback(functools.partial(self._moved, run[1]))
                posted.append(message)
        outcomes = await asyncio.gather(*posted, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if self._dead is not None:
            raise TransportError("aborted")

    async def _move(self, verb: Literal["send", "recv"], run: tuple[int, int], tag: int) -> None:
        """Send or receive one message, through a buffer where its blocks are no run of bytes."""
        buffers = self._buffers
        if buffers is None:
            await self._post(verb, region(self._memory, *run), tag)
            return
        if verb == "send":
            buffer = await buffers.gather(*run)
            await self._post(verb, buffer, tag)
        else:
            buffer = buffers.take(run[1])
            self._arrivals.begin(tag, buffer)
            try:
                await self._post(verb, buffer, tag)
            finally:
                self._arrivals.end(tag)
            await buffers.scatter(*run, buffer)
        buffers.give_back(run[1], buffer)  # where anything went wrong it is left alone

    def _moved(self, num_blocks: int, _: asyncio.Task[None]) -> None:
        self._slots.release()
        if self._buffers is not None:
            self._room.free(num_blocks * self._memory.block_bytes)

    async def _post(self, verb: Literal["send", "recv"], buffer: object, tag: int) -> None:
        # Between deciding to post and posting the link may have been aborted; ucxx itself would trip over that.
        if self._dead is not None:
            raise TransportError("aborted")
        await (self._endpoint.send if verb == "send" else self._endpoint.recv)(buffer, tag=tag)
        self._num_messages += 1
