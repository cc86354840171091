"""Our connections to peers: how each begins, that there is one per pair, and how it ends with all that went over it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Final, TypeVar

from kvstore.errors import ExchangeError, IncompatiblePeer, PeerUnreachable
from kvstore.exchange.connection import Connection
from kvstore.exchange.framing import STREAM_BUFFER_BYTES, FrameStream
from kvstore.exchange.handshake import (
    Introduction,
    PeerIdentity,
    introduce_as_owner,
    introduce_as_reader,
)
from kvstore.exchange.observer import ExchangeObserver
from kvstore.exchange.owner import OwnerSession
from kvstore.exchange.reader import ReaderSession
from kvstore.protocol import ExchangeTimeouts
from kvstore.transport import Transport

logger = logging.getLogger(__name__)

_Session = TypeVar("_Session", ReaderSession, OwnerSession)

# Strangers: connected, and not introduced yet. More are turned away, since each may hold a frame of memory.
_MAX_STRANGERS: Final = 64


class PeerSessions:
    """Whom we read from and who reads from us. Owns every task of theirs. All methods belong to the event loop.

    `as_reader` and `as_owner` make the session of a connection that was dialled and of one that was accepted.
    """

    def __init__(
        self,
        identity: PeerIdentity,
        transports: Sequence[Transport],
        timeouts: ExchangeTimeouts,
        clock: Callable[[], float],
        observer: ExchangeObserver,
        as_reader: Callable[[Introduction, Connection], ReaderSession],
        as_owner: Callable[[Introduction, Connection], OwnerSession],
    ) -> None:
        self.owners: dict[str, ReaderSession] = {}  # whom we read from
        self.readers: dict[str, OwnerSession] = {}  # who reads from us
        # These and all that are gone but not drained yet.
        self.undrained: set[ReaderSession | OwnerSession] = set()
        self._identity = identity
        self._transports = transports
        self._timeouts = timeouts
        self._clock = clock
        self._observer = observer
        self._as_reader = as_reader
        self._as_owner = as_owner
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: set[asyncio.Task[None]] = set()
        self._dials: dict[str, asyncio.Task[str]] = {}
        self._owner_at: dict[str, str] = {}  # address as dialled -> peer id

    def owner(self, peer_id: str) -> ReaderSession | None:
        """The live connection over which we read from this peer."""
        session = self.owners.get(peer_id)
        return session if session is not None and session.connection.is_open else None

    def reader(self, peer_id: str) -> OwnerSession | None:
        """The live connection over which this peer reads from us."""
        session = self.readers.get(peer_id)
        return session if session is not None and session.connection.is_open else None

    async def connect(self, address: str) -> str:
        """Dial the owner at `host:port`, unless we are connected to it; errors as `BlockExchange.connect`."""
        peer_id = self._owner_at.get(address)
        if peer_id is not None and self.owner(peer_id) is not None:
            return peer_id
        if self._closing:
            raise PeerUnreachable(f"{address}: we are closing")
        dial = self._dials.get(address)
        if dial is None:
            # In a context of its own: a connection outlives the request that needed it first, and serves others.
            dial = asyncio.get_running_loop().create_task(self._dial(address), context=contextvars.Context())
            self._dials[address] = dial
            dial.add_done_callback(lambda done: self._dial_ended(address, done))
        try:
            return await asyncio.shield(dial)
        except asyncio.CancelledError:
            if dial.cancelled() and self._closing:  # the dial, and not whoever waits for it
                raise PeerUnreachable(f"{address}: we are closing") from None
            raise

    async def close(self) -> None:
        """Turn newcomers away and end all connections, with what goes over them. Bounded in time."""
        self._closing = True
        newcomers = [*self._strangers, *self._dials.values()]
        for task in newcomers:
            task.cancel()
        await asyncio.gather(*newcomers, return_exceptions=True)
        for session in list(self.undrained):
            session.connection.close("we are closing")
        if self._tasks:
            # What is left then waits for a caller's reservation; cancelling it ends the fetch without blocks.
            _, pending = await asyncio.wait(self._tasks, timeout=self._timeouts.close_s)
            for unfinished in pending:
                unfinished.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def start_task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run work of a session as a task of ours, which `close` awaits."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the block exchange broke", exc_info=error)

    async def _dial(self, address: str) -> str:
        """Dial, shake hands, install the session. At every moment somebody owns the socket and, later, the link."""
        host, _, port = address.rpartition(":")
        stage = "connecting"
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=STREAM_BUFFER_BYTES)
                stage, stream = "handshake", FrameStream(reader, writer)
                try:
                    introduction = await introduce_as_reader(stream, self._identity, self._transports)
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
        self._install(self.owners, self._as_reader(introduction, connection))
        return peer_id

    def _dial_ended(self, address: str, dial: asyncio.Task[str]) -> None:
        del self._dials[address]
        if not dial.cancelled():
            dial.exception()  # whoever waits for it sees it; nobody may be left to

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Shake hands with a peer that has dialled us, and install its session."""
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
                introduction = await introduce_as_owner(stream, self._identity, self._transports)
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
        self._install(self.readers, self._as_owner(introduction, connection))

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
        self.undrained.add(session)
        logger.info(
            "connected: %s (%s, incarnation %s), blocks travel over %s, lane %s",
            session.connection.name,
            session.peer.role,
            session.peer.incarnation,
            session.transport_name,
            session.link.lane,
        )
        self._observer.peer_connected(peer_id, session.transport_name, session.link.lane, we_read)
        self.start_task(self._run(sessions, session))

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
                if we_read:
                    self._owner_at = {address: each for address, each in self._owner_at.items() if each != peer_id}
            try:
                session.connection_lost(reason)
            finally:
                session.link.abort(reason)
            self._observer.peer_lost(peer_id, reason, we_read)
            await session.link.close()
            await session.drained()
            self.undrained.discard(session)
