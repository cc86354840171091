"""The block protocol's I/O shell: one per worker process, living in its event loop.

There is one connection per (reader, owner) pair: whoever wants to read dials, and over that connection only reads. Two
workers that read from each other have two, so simultaneous dialling both ways needs no tie-break. A connection's death
ends every lease and fetch on it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from kvstore.block_hash import BlockHash
from kvstore.connection import Connection
from kvstore.errors import ExchangeError, IncompatiblePeer, PeerLost, PeerUnreachable, TransportError
from kvstore.fetch_events import FetchCause, OwnerLost, ReadLimits
from kvstore.framing import STREAM_BUFFER_BYTES, FrameStream
from kvstore.handshake import PeerIdentity, introduce_as_owner, introduce_as_reader
from kvstore.lending import PrefixLender, lend
from kvstore.memory import BlockMemory
from kvstore.messages import Have, Want
from kvstore.observer import ExchangeObserver
from kvstore.owner import Lease, OwnerSession
from kvstore.reader import Fetch, ReaderSession, ReaderTools, ReserveFunction
from kvstore.timeouts import ExchangeTimeouts
from kvstore.transport.base import Transport

logger = logging.getLogger(__name__)

OnHave = Callable[[PeerIdentity, Have], None]
"""Hears of blocks that a reader of ours holds; called in the event loop, and must return at once."""

_Session = TypeVar("_Session", ReaderSession, OwnerSession)

# Strangers: connected, and not introduced yet. More are turned away, since each may hold a frame of memory.
_MAX_STRANGERS: Final = 64


class BlockExchange:
    """Lends our blocks to readers and fetches blocks from owners. All methods belong to the event loop.

    `memory` must be what `identity.layout` says. `observer` hears of everything that happens, for metrics.
    """

    def __init__(
        self,
        identity: PeerIdentity,
        memory: BlockMemory,
        transports: Sequence[Transport],
        timeouts: ExchangeTimeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: ExchangeObserver | None = None,
        limits: ReadLimits | None = None,
        lender: PrefixLender | None = None,
        on_have: OnHave | None = None,
    ) -> None:
        if memory.block_bytes != identity.layout.block_bytes:
            raise ValueError(
                f"the pool's blocks have {memory.block_bytes} bytes, the layout's {identity.layout.block_bytes}"
            )
        self.identity = identity
        self._transports = list(transports)
        self._timeouts = timeouts or ExchangeTimeouts()
        self._clock = clock
        self.clock = clock  # of the stamps in a FetchResult
        self._observer = observer or ExchangeObserver()
        self._server: asyncio.Server | None = None
        self._address = ""
        self._closing = False
        self._lender = lender
        self._on_have = on_have
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: set[asyncio.Task[None]] = set()
        self._dials: dict[str, asyncio.Task[str]] = {}
        self._owner_at: dict[str, str] = {}  # address as dialled -> peer id
        self._owners: dict[str, ReaderSession] = {}  # whom we read from
        self._readers: dict[str, OwnerSession] = {}  # who reads from us
        # These and all that are gone but not drained yet.
        self._sessions: set[ReaderSession | OwnerSession] = set()
        self._digest_executor = ThreadPoolExecutor(1, thread_name_prefix="kv-digest")
        self._tools = ReaderTools(
            memory,
            self._timeouts,
            clock,
            self._observer,
            self._digest_executor,
            self._start_task,
            limits or ReadLimits(),
        )

    # ---- life ----

    async def start(self, host: str, port: int) -> None:
        """Start the transports and listen; port 0 takes a free one. Raises `TransportError`, OSError.

        A transport that cannot start is left out as long as another one can.
        """
        for transport in list(self._transports):
            try:
                await transport.start()
            except TransportError as error:
                await transport.close()
                self._transports.remove(transport)
                if not self._transports:
                    raise
                logger.warning("no blocks will travel over %s: %s", transport.name, error)
        self._server = await asyncio.start_server(self._accept, host, port, limit=STREAM_BUFFER_BYTES)
        bound_host, bound_port = self._server.sockets[0].getsockname()[:2]
        self._address = f"{bound_host}:{bound_port}"

    @property
    def address(self) -> str:
        """`host:port` that we listen on."""
        return self._address

    async def close(self) -> None:
        """End all connections, leases and fetches, then the transports. Bounded in time; may be called again."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        newcomers = [*self._strangers, *self._dials.values()]
        for task in newcomers:
            task.cancel()
        await asyncio.gather(*newcomers, return_exceptions=True)
        for session in list(self._sessions):
            session.connection.close("we are closing")
        if self._tasks:
            # What is left then waits for a caller's reservation; cancelling it ends the fetch without blocks.
            _, pending = await asyncio.wait(self._tasks, timeout=self._timeouts.close_s)
            for unfinished in pending:
                unfinished.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        for transport in self._transports:
            await transport.close()
        self._digest_executor.shutdown(wait=True)
        if self._server is not None:
            await self._server.wait_closed()

    def state(self) -> dict[str, object]:
        """Return what goes on, as plain values, for a debug endpoint."""
        return {
            "address": self._address,
            "owners": [_describe(session) for session in self._owners.values()],
            "readers": [_describe(session) for session in self._readers.values()],
            "fetches": [
                {
                    "transfer_id": fetch.transfer_id.hex(),
                    "owner": session.peer.peer_id,
                    "state": fetch.state,
                    "quarantined_blocks": fetch.quarantined,
                }
                for session in self._sessions
                if isinstance(session, ReaderSession)
                for fetch in session.fetches.values()
            ],
            "leases": [
                {
                    "transfer_id": lease.transfer_id.hex(),
                    "reader": session.peer.peer_id,
                    "state": lease.state,
                    "num_announced": lease.num_announced,
                }
                for session in self._sessions
                if isinstance(session, OwnerSession)
                for lease in session.leases.values()
            ],
        }

    # ---- connections ----

    async def connect(self, address: str) -> str:
        """Connect to an owner of blocks at `host:port`, unless we are; return its peer id.

        Raises `PeerUnreachable`, `IncompatiblePeer` (the message says both sides' values).
        """
        peer_id = self._owner_at.get(address)
        if peer_id is not None and self._is_live(self._owners.get(peer_id)):
            return peer_id
        if self._closing:
            raise PeerUnreachable(f"{address}: we are closing")
        dial = self._dials.get(address)
        if dial is None:
            # In a context of its own: a connection outlives the request that needed it first, and serves others.
            dial = asyncio.get_running_loop().create_task(self._dial(address), context=contextvars.Context())
            self._dials[address] = dial
            dial.add_done_callback(lambda done: self._dial_ended(address, done))
        return await asyncio.shield(dial)

    def is_connected(self, peer_id: str) -> bool:
        """Whether there is a live connection to this peer, dialled by either side."""
        return self._is_live(self._owners.get(peer_id)) or self._is_live(self._readers.get(peer_id))

    def lane_to(self, owner_peer_id: str) -> str:
        """On which lane we read from an owner; empty where we are not connected to it."""
        session = self._owners.get(owner_peer_id)
        return session.link.lane if session is not None else ""

    @staticmethod
    def _is_live(session: ReaderSession | OwnerSession | None) -> bool:
        return session is not None and session.connection.is_open

    async def _dial(self, address: str) -> str:
        """Dial, shake hands, install the session. At every moment somebody owns the socket and, later, the link."""
        host, _, port = address.rpartition(":")
        stage = "connecting"
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=STREAM_BUFFER_BYTES)
                stage, stream = "handshake", FrameStream(reader, writer)
                try:
                    introduction = await introduce_as_reader(stream, self.identity, self._transports)
                except BaseException:
                    await stream.close(flush_s=self._timeouts.heartbeat_s)
                    raise
        except IncompatiblePeer as error:
            logger.error("%s is no peer of ours: %s", address, error)
            self._observer.peer_refused(address, str(error))
            raise
        except (ExchangeError, OSError, TimeoutError, ValueError) as error:
            why = str(error) or f"not done within {self._timeouts.connect_s} s"
            raise PeerUnreachable(f"{address}: {stage} failed: {why}") from error
        peer_id = introduction.peer.peer_id
        connection = Connection(stream, f"owner {peer_id} at {address}", self._timeouts, self._clock)
        self._owner_at[address] = peer_id
        self._install(self._owners, ReaderSession(introduction, connection, self._tools))
        return peer_id

    def _dial_ended(self, address: str, dial: asyncio.Task[str]) -> None:
        del self._dials[address]
        if not dial.cancelled():
            dial.exception()  # whoever waits for it sees it; nobody may be left to

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream, task = FrameStream(reader, writer), asyncio.current_task()
        assert task is not None
        if self._closing or len(self._strangers) >= _MAX_STRANGERS:
            why = "we are closing" if self._closing else f"{_MAX_STRANGERS} others are introducing themselves"
            logger.warning("%s turned away: %s", stream.peer_address, why)
            await stream.close()
            return
        self._strangers.add(task)
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                introduction = await introduce_as_owner(stream, self.identity, self._transports)
        except (ExchangeError, TimeoutError, asyncio.CancelledError) as error:
            self._log_failed_handshake(stream, error)
            await stream.close(flush_s=self._timeouts.heartbeat_s)
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        finally:
            self._strangers.discard(task)
        connection = Connection(
            stream, f"reader {introduction.peer.peer_id} at {stream.peer_address}", self._timeouts, self._clock
        )
        session = OwnerSession(
            introduction,
            connection,
            self._timeouts,
            self._clock,
            self._observer,
            self._lend if self._lender else None,
            self._heard_of if self._on_have else None,
        )
        self._install(self._readers, session)

    def _log_failed_handshake(self, stream: FrameStream, error: BaseException) -> None:
        if isinstance(error, IncompatiblePeer):
            logger.error("%s is no peer of ours: %s", stream.peer_address, error)
            self._observer.peer_refused(stream.peer_address, str(error))
        elif isinstance(error, TimeoutError):
            logger.warning("%s: no handshake within %s s", stream.peer_address, self._timeouts.connect_s)
        elif isinstance(error, ExchangeError):
            logger.warning("%s: handshake failed: %s", stream.peer_address, error)

    def _install(self, sessions: dict[str, _Session], session: _Session) -> None:
        """Make a connection the live one of its pair; an older one is a corpse that we had not noticed yet."""
        peer_id, we_read = session.peer.peer_id, isinstance(session, ReaderSession)
        if (old := sessions.get(peer_id)) is not None:
            old.connection.close(f"incarnation {session.peer.incarnation} of {peer_id} has connected anew")
        sessions[peer_id] = session
        self._sessions.add(session)
        logger.info(
            "connected: %s (%s, incarnation %s), blocks travel over %s, lane %s",
            session.connection.name,
            session.peer.role,
            session.peer.incarnation,
            session.transport_name,
            session.link.lane,
        )
        self._observer.peer_connected(peer_id, session.transport_name, session.link.lane, we_read)
        self._start_task(self._run(sessions, session))

    async def _run(self, sessions: dict[str, _Session], session: _Session) -> None:
        """Run one connection to its end, then end all that went over it, to the last byte that may still arrive."""
        peer_id, we_read = session.peer.peer_id, isinstance(session, ReaderSession)
        reason = "the exchange was cancelled"
        try:
            reason = await session.connection.run(session.on_message, session.live_transfers)
        finally:
            logger.info("connection to %s has ended: %s", session.connection.name, reason)
            if sessions.get(peer_id) is session:
                del sessions[peer_id]
            try:
                session.connection_lost(reason)
            finally:
                session.link.abort(reason)
            self._observer.peer_lost(peer_id, reason, we_read)
            await session.link.close()
            await session.drained()
            self._sessions.discard(session)

    # ---- owner ----

    def open_lease(self, transfer_id: bytes, reader_peer_id: str, num_blocks: int) -> Lease:
        """Offer `num_blocks` blocks, to be announced as they are computed, to a reader that has dialled us.

        Raises `PeerLost` where it is not connected.
        """
        session = self._readers.get(reader_peer_id)
        if session is None or not session.connection.is_open:
            raise PeerLost(f"transfer {transfer_id.hex()}: reader {reader_peer_id} is not connected")
        return session.open_lease(transfer_id, num_blocks)

    def _lend(self, session: OwnerSession, want: Want) -> None:
        assert self._lender is not None
        self._start_task(lend(session, want, self._lender))

    def _heard_of(self, session: OwnerSession, have: Have) -> None:
        assert self._on_have is not None
        self._on_have(session.peer, have)

    # ---- reader ----

    def fetch(
        self,
        transfer_id: bytes,
        owner_peer_id: str,
        expected_hashes: Sequence[BlockHash | None],
        reserve: ReserveFunction,
        owner_incarnation: str | None = None,
        may_be_fewer: bool = False,
    ) -> Fetch:
        """Wait for an owner's Offer, then read its blocks; call this before ordering them from the owner.

        `expected_hashes`: one per block; None: the partial last block; with `may_be_fewer`, a prefix of them may be
        offered. `reserve(num_blocks)` is called on the Offer. It must end by itself in bounded time: it is not
        cancelled when the fetch fails (a granted reservation would be lost), so whoever aborts a fetch also withdraws
        what `reserve` waits for. With `owner_incarnation`, a connection to any other start of that worker fails the
        fetch. Raises `PeerLost` where we have no connection to the owner, ValueError where the transfer is being
        fetched already.
        """
        session = self._owners.get(owner_peer_id)
        if session is None or not session.connection.is_open:
            raise PeerLost(f"transfer {transfer_id.hex()}: owner {owner_peer_id} is not connected")
        if transfer_id in session.fetches:
            raise ValueError(f"transfer {transfer_id.hex()} is being fetched already")
        fetch = Fetch(session, transfer_id, expected_hashes, reserve, may_be_fewer)
        session.fetches[transfer_id] = fetch
        if owner_incarnation is not None and session.peer.incarnation != owner_incarnation:
            detail = f"{owner_peer_id} is incarnation {session.peer.incarnation}, not {owner_incarnation}"
            fetch.handle(OwnerLost(detail, FetchCause.UNKNOWN_INCARNATION))
        return fetch

    def fetch_prefix(
        self,
        transfer_id: bytes,
        owner_peer_id: str,
        hashes: Sequence[BlockHash],
        reserve: ReserveFunction,
        owner_incarnation: str | None = None,
    ) -> Fetch:
        """Ask an owner for the longest prefix of these blocks that it holds, and read it; errors as `fetch`.

        `reserve` is called with the number of blocks that it offers; a failure with cause `revoked` means it has none.
        """
        fetch = self.fetch(transfer_id, owner_peer_id, hashes, reserve, owner_incarnation, may_be_fewer=True)
        if not fetch.has_result:
            self._owners[owner_peer_id].connection.send(Want(transfer_id, list(hashes)))
        return fetch

    def tell_have(
        self, owner_peer_id: str, address: str, parent_hash: BlockHash | None, hashes: Sequence[BlockHash]
    ) -> None:
        """Tell an owner that we hold this run of chained blocks and lend it at `address`: it may fetch it from there.

        Raises `PeerLost` where we have no connection to the owner.
        """
        session = self._owners.get(owner_peer_id)
        if session is None or not session.connection.is_open:
            raise PeerLost(f"{owner_peer_id} is not connected, and cannot be told of {len(hashes)} blocks")
        session.connection.send(Have(address, parent_hash, list(hashes)))

    # ---- tasks ----

    def _start_task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the block exchange broke", exc_info=error)


def _describe(session: ReaderSession | OwnerSession) -> dict[str, object]:
    return {
        "peer_id": session.peer.peer_id,
        "role": session.peer.role,
        "incarnation": session.peer.incarnation,
        "transport": session.transport_name,
        "lane": session.link.lane,
        "connected": session.connection.is_open,
    }
