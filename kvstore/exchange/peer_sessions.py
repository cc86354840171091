"""Keeps our connections to peers: begins them, one per pair, and waits for their end."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from kvstore.complaints import Complaints
from kvstore.errors import ExchangeError, IncompatiblePeer, PeerLost, PeerUnreachable, UnprovenPeer
from kvstore.exchange.connection import Connection, Tools
from kvstore.exchange.framing import FrameStream, Outside
from kvstore.exchange.handshake import Ourselves, PeerIdentity, Side, introduce_as_owner, introduce_as_reader
from kvstore.protocol import OwnerSession, ReaderSession
from kvstore.transport import Transport

logger = logging.getLogger(__name__)

ToOwner: TypeAlias = Connection[ReaderSession]
ToReader: TypeAlias = Connection[OwnerSession]

# Strangers: connected, and not proven yet. Of more the first is turned away, so that those who only connect, and say
# nothing, keep nobody out for long.
_MAX_STRANGERS: Final = 64


class PeerSessions:
    """Owns the sessions with those we read from and who read from us, and their tasks. Event loop only."""

    def __init__(
        self,
        ourselves: Ourselves,
        outside: Outside,
        transports: Sequence[Transport],
        make_tools: Callable[[PeerSessions], Tools],
    ) -> None:
        """`transports` may lose some until the first connection."""
        self.owners: dict[str, ToOwner] = {}  # whom we read from
        self.readers: dict[str, ToReader] = {}  # who reads from us
        # These and all that are gone but not drained yet, as keys, in the order in which they began.
        self.undrained: dict[ToOwner | ToReader, None] = {}
        self._ourselves = ourselves
        self._outside = outside
        self._complaints = Complaints(logger, outside.clock)  # of those who may be anybody
        self._refusals = Complaints(logger, outside.clock)  # of those who may be peers, and do not fit
        self._transports = transports
        self._tools = make_tools(self)
        self._timeouts = self._tools.timeouts
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], FrameStream] = {}
        self._newcomers: set[asyncio.Task[None]] = set()  # proven, and their link is being made
        self._linking: dict[asyncio.Timeout, str] = {}  # over which transport links are being made, by their deadlines
        self._dials: dict[str, asyncio.Task[str]] = {}
        self._owner_at: dict[str, str] = {}  # address as dialled -> peer id

    def owner(self, peer_id: str) -> ToOwner | None:
        """The live connection over which we read from this peer."""
        connection = self.owners.get(peer_id)
        return connection if connection is not None and connection.is_open else None

    def reader(self, peer_id: str) -> ToReader | None:
        """The live connection over which this peer reads from us."""
        connection = self.readers.get(peer_id)
        return connection if connection is not None and connection.is_open else None

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

    def leave(self, transports: Collection[str]) -> None:
        """End all connections that go, or are to go, over transports of these names."""
        for limit, name in self._linking.items():
            if name in transports and not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())
        for connection in self.undrained:
            if connection.transport_name in transports:
                connection.close(f"our transport {connection.transport_name} stands still")

    async def close(self) -> None:
        """Turn newcomers away and end all connections, with what goes over them. Bounded in time."""
        self._closing = True
        newcomers = [*self._strangers, *self._newcomers, *self._dials.values()]
        for task in newcomers:
            task.cancel()
        await asyncio.gather(*newcomers, return_exceptions=True)
        for connection in list(self.undrained):
            connection.close("we are closing")
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
        stage, allowed_s = "connecting", min(self._timeouts.peer_timeout_s, self._timeouts.connect_s)
        ends_s = asyncio.get_running_loop().time() + self._timeouts.connect_s
        try:
            async with asyncio.timeout(allowed_s) as limit:

                def on_proven(_: PeerIdentity) -> None:
                    """It answers, so it lives: making the link may take longer."""
                    nonlocal allowed_s
                    allowed_s = self._timeouts.connect_s
                    limit.reschedule(ends_s)

                stream = await self._outside.net.dial(host.strip("[]"), int(port))
                stage = "handshake"
                try:
                    introduction = await introduce_as_reader(stream, self._side(on_proven, limit))
                except BaseException:
                    await stream.close(flush_s=self._timeouts.heartbeat_s)
                    raise
        except IncompatiblePeer as error:
            logger.error("%s is no peer of ours: %s", address, error)
            self._tools.observer.peer_refused(address, str(error))
            raise
        except (ExchangeError, OSError, TimeoutError, ValueError) as error:
            why = str(error) or f"not done within {allowed_s} s, or our transport stands still"
            raise PeerUnreachable(f"{address}: {stage} failed: {why}") from error
        finally:
            self._linking.pop(limit, None)
        peer_id = introduction.peer.peer_id
        session = ReaderSession(
            introduction.peer.incarnation,
            introduction.features,
            introduction.transport.two_sided,
            self._tools.memory.block_bytes,
            self._timeouts,
            self._tools.clock(),
        )
        self._owner_at[address] = peer_id
        name = f"owner {peer_id} at {address}"
        self._install(self.owners, Connection(name, stream, introduction, session, self._tools))
        return peer_id

    def _dial_ended(self, address: str, dial: asyncio.Task[str]) -> None:
        del self._dials[address]
        if not dial.cancelled():
            dial.exception()  # whoever waits for it sees it; nobody may be left to

    async def accept(self, stream: FrameStream) -> None:
        """Shake hands with a peer that has dialled us, and install its session."""
        task = asyncio.current_task()
        assert task is not None
        if self._closing:
            await stream.close()
            return
        if len(self._strangers) >= _MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            await self._strangers.pop(oldest).close()  # which ends its handshake
        self._strangers[task] = stream

        def on_proven(_: PeerIdentity) -> None:
            if self._strangers.pop(task, None) is None:  # with its proof read already
                raise PeerLost("turned away, as too many others came after it")
            self._newcomers.add(task)

        try:
            async with asyncio.timeout(self._timeouts.connect_s) as limit:
                introduction = await introduce_as_owner(stream, self._side(on_proven, limit))
        except (ExchangeError, TimeoutError, asyncio.CancelledError) as error:
            self._log_failed_handshake(stream, error)
            await stream.close(flush_s=self._timeouts.heartbeat_s)
            if isinstance(error, asyncio.CancelledError) and not self._closing:
                raise  # else it is ours, and asyncio's streams (Python 3.11) would report it as an error
            return
        finally:
            self._linking.pop(limit, None)
            self._strangers.pop(task, None)
            self._newcomers.discard(task)
        transport = introduction.transport
        session = OwnerSession(transport.name, transport.two_sided, self._timeouts, self._tools.clock())
        name = f"reader {introduction.peer.peer_id} at {stream.peer_address}"
        self._install(self.readers, Connection(name, stream, introduction, session, self._tools))

    def _side(self, on_proven: Callable[[PeerIdentity], None], limit: asyncio.Timeout) -> Side:
        """What we bring to a handshake that has until `limit`."""
        on_chosen = partial(self._linking.__setitem__, limit)
        return Side(self._ourselves, self._transports, self._outside.new_id, on_proven, on_chosen)

    def _log_failed_handshake(self, stream: FrameStream, error: BaseException) -> None:
        who, observer = stream.peer_address, self._tools.observer
        if isinstance(error, UnprovenPeer):
            self._complaints.log(logging.WARNING, "%s is no peer of ours: %s", who, error)
            observer.peer_unproven(who, str(error))
        elif isinstance(error, IncompatiblePeer):
            self._refusals.log(logging.ERROR, "%s is no peer of ours: %s", who, error)
            observer.peer_refused(who, str(error))
        elif isinstance(error, TimeoutError):
            self._complaints.log(logging.WARNING, "%s: no handshake within %s s", who, self._timeouts.connect_s)
        elif isinstance(error, ExchangeError):
            self._complaints.log(logging.WARNING, "%s: handshake failed: %s", who, error)

    def _install(self, connections: dict[str, Connection[Any]], connection: Connection[Any]) -> None:
        """Make a connection the live one of its pair; an older one is a corpse that we had not noticed yet.

        It has just proven itself, so its process lives: that settles who is newer, and clocks do not.
        """
        peer, lane, we_read = connection.peer, connection.link.lane, connections is self.owners
        if (old := connections.get(peer.peer_id)) is not None:
            old.close(f"incarnation {peer.incarnation} of {peer.peer_id} has connected anew")
        connections[peer.peer_id] = connection
        self.undrained[connection] = None
        text = "connected: %s (%s, incarnation %s), blocks travel over %s, lane %s"
        logger.debug(text, connection.name, peer.role, peer.incarnation, connection.transport_name, lane)
        self._tools.observer.peer_connected(peer.peer_id, connection.transport_name, lane, we_read)
        self.start_task(self._run(connections, connection))

    async def _run(self, connections: dict[str, Connection[Any]], connection: Connection[Any]) -> None:
        """Run one connection to its end, and keep it until all that went over it has ended."""
        peer_id, we_read, reason = connection.peer.peer_id, connections is self.owners, "the exchange was cancelled"
        try:
            reason = await connection.run()
        finally:
            logger.debug("connection to %s has ended: %s", connection.name, reason)
            if connections.get(peer_id) is connection:
                del connections[peer_id]
                if we_read:
                    self._owner_at = {address: each for address, each in self._owner_at.items() if each != peer_id}
            self._tools.observer.peer_lost(peer_id, reason, we_read)
            await connection.drained()
            del self.undrained[connection]
