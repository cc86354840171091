"""The block protocol's I/O shell: one per worker process, living in its event loop.

There is one connection per (reader, owner) pair (`peer_sessions`): whoever wants to read dials, and over that
connection only reads. Two workers that read from each other have two, so simultaneous dialling both ways needs no
tie-break. A connection's death ends every lease and fetch on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvstore.block import BlockHash, BlockMemory
from kvstore.errors import PeerLost, TransportError
from kvstore.exchange.connection import Connection
from kvstore.exchange.framing import STREAM_BUFFER_BYTES
from kvstore.exchange.handshake import Introduction, PeerIdentity
from kvstore.exchange.lending import PrefixLender, lend
from kvstore.exchange.observer import ExchangeObserver
from kvstore.exchange.owner import Lease, OwnerSession
from kvstore.exchange.peer_sessions import PeerSessions
from kvstore.exchange.reader import (
    Fetch,
    ReaderSession,
    ReaderTools,
    ReserveFunction,
)
from kvstore.protocol import (
    MAX_HASHES,
    ExchangeTimeouts,
    FetchCause,
    Have,
    OwnerLost,
    ReadLimits,
    Revoke,
    Suspect,
    Want,
)
from kvstore.transport import Transport

logger = logging.getLogger(__name__)

# Prefixes that one reader may be lent at a time; each pins blocks and has a task.
_MAX_WANTS: Final = 256

OnHave = Callable[[PeerIdentity, Have], None]
"""Hears of blocks that a reader of ours holds; called in the event loop, and must return at once."""

RequestScope = Callable[[str], contextlib.AbstractContextManager[None]]
"""Makes what is logged within, and in tasks begun there, name a request."""


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
        request_scope: RequestScope | None = None,
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
        self._lender = lender
        self._on_have = on_have
        self._request_scope = request_scope or (lambda _: contextlib.nullcontext())
        self._sessions = PeerSessions(
            identity, self._transports, self._timeouts, clock, self._observer, self._as_reader, self._as_owner
        )
        self._digest_executor = ThreadPoolExecutor(1, thread_name_prefix="kv-digest")
        self._tools = ReaderTools(
            memory,
            clock,
            self._observer,
            self._digest_executor,
            self._sessions.start_task,
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
        self._server = await asyncio.start_server(self._sessions.accept, host, port, limit=STREAM_BUFFER_BYTES)
        bound_host, bound_port = self._server.sockets[0].getsockname()[:2]
        self._address = f"{bound_host}:{bound_port}"

    @property
    def address(self) -> str:
        """`host:port` that we listen on."""
        return self._address

    async def close(self) -> None:
        """End all connections, leases and fetches, then the transports. Bounded in time; may be called again."""
        if self._server is not None:
            self._server.close()
        await self._sessions.close()
        for transport in self._transports:
            await transport.close()
        self._digest_executor.shutdown(wait=True)
        if self._server is not None:
            await self._server.wait_closed()

    @property
    def can_move_blocks(self) -> bool:
        """Whether a transport works; where none does, no new peer gets anything from us, nor we from it."""
        return any(transport.problem() is None for transport in self._transports)

    def state(self) -> dict[str, object]:
        """Return what goes on, as plain values, for a debug endpoint."""
        return {
            "address": self._address,
            "transports": {transport.name: transport.problem() or "ok" for transport in self._transports},
            "owners": [_describe(session) for session in self._sessions.owners.values()],
            "readers": [_describe(session) for session in self._sessions.readers.values()],
            "fetches": [
                {
                    "transfer_id": fetch.transfer_id.hex(),
                    "owner": session.peer.peer_id,
                    "state": fetch.state,
                    "quarantined_blocks": fetch.quarantined,
                }
                for session in self._sessions.undrained
                if isinstance(session, ReaderSession)
                for fetch in session.fetches.values()
            ],
            "leases": [
                {
                    "transfer_id": lease.transfer_id.hex(),
                    "reader": session.peer.peer_id,
                    "request_id": lease.request_id,
                    "state": lease.state,
                    "num_announced": lease.num_announced,
                }
                for session in self._sessions.undrained
                if isinstance(session, OwnerSession)
                for lease in session.leases.values()
            ],
        }

    def _as_reader(self, introduction: Introduction, connection: Connection) -> ReaderSession:
        return ReaderSession(introduction, connection, self._tools)

    def _as_owner(self, introduction: Introduction, connection: Connection) -> OwnerSession:
        return OwnerSession(
            introduction,
            connection,
            self._timeouts,
            self._clock,
            self._observer,
            self._lend if self._lender else None,
            self._heard_of if self._on_have else None,
            self._suspected if self._lender else None,
        )

    # ---- connections ----

    async def connect(self, address: str) -> str:
        """Connect to an owner of blocks at `host:port`, unless we are; return its peer id.

        Raises `PeerUnreachable`, `IncompatiblePeer` (the message says both sides' values).
        """
        return await self._sessions.connect(address)

    def is_connected(self, peer_id: str) -> bool:
        """Whether there is a live connection to this peer, dialled by either side."""
        return self._sessions.owner(peer_id) is not None or self._sessions.reader(peer_id) is not None

    def lane_to(self, owner_peer_id: str) -> str:
        """On which lane we read from an owner; empty where we are not connected to it."""
        session = self._sessions.owners.get(owner_peer_id)
        return session.link.lane if session is not None else ""

    # ---- owner ----

    def open_lease(self, transfer_id: bytes, reader_peer_id: str, num_blocks: int, request_id: str = "") -> Lease:
        """Offer `num_blocks` blocks, to be announced as they are computed, to a reader that has dialled us.

        `request_id` is what `state` names it by. Raises `PeerLost` where it is not connected.
        """
        session = self._sessions.reader(reader_peer_id)
        if session is None:
            raise PeerLost(f"transfer {transfer_id.hex()}: reader {reader_peer_id} is not connected")
        return session.open_lease(transfer_id, num_blocks, request_id)

    def _lend(self, session: OwnerSession, want: Want) -> None:
        assert self._lender is not None
        if len(session.wants) >= _MAX_WANTS:
            session.connection.send(Revoke(want.transfer_id, f"{_MAX_WANTS} transfers are being lent to you already"))
            return
        session.wants.add(want.transfer_id)
        # A session's own context is nobody's: without an id nothing is to be named.
        scope = self._request_scope(want.request_id) if want.request_id else contextlib.nullcontext()
        with scope:
            lending = self._sessions.start_task(lend(session, want, self._lender))
        lending.add_done_callback(lambda _: session.wants.discard(want.transfer_id))

    def _suspected(self, session: OwnerSession, suspect: Suspect) -> None:
        assert self._lender is not None
        logger.warning("%s read other bytes than we announced, of %d blocks", session.peer.peer_id, len(suspect.hashes))
        self._sessions.start_task(self._lender.recheck([BlockHash(block_hash) for block_hash in suspect.hashes]))

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
        stage_s: float | None = None,
    ) -> Fetch:
        """Wait for an owner's Offer, then read its blocks; call this before ordering them from the owner.

        `expected_hashes`: one per block; None: the partial last block; with `may_be_fewer`, a prefix of them may be
        offered. `reserve(num_blocks)` is called on the Offer. It must end by itself in bounded time: it is not
        cancelled when the fetch fails (a granted reservation would be lost), so whoever aborts a fetch also withdraws
        what `reserve` waits for. With `owner_incarnation`, a connection to any other start of that worker fails the
        fetch. `stage_s` takes the place of the exchange's own deadlines of each stage and each read. Raises
        `PeerLost` where we have no connection to the owner, ValueError where the transfer is being fetched already.
        """
        session = self._sessions.owner(owner_peer_id)
        if session is None:
            raise PeerLost(f"transfer {transfer_id.hex()}: owner {owner_peer_id} is not connected")
        if transfer_id in session.fetches:
            raise ValueError(f"transfer {transfer_id.hex()} is being fetched already")
        timeouts = self._timeouts if stage_s is None else self._timeouts.with_stages_of(stage_s)
        fetch = Fetch(session, transfer_id, expected_hashes, reserve, timeouts, may_be_fewer)
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
        request_id: str = "",
        stage_s: float | None = None,
    ) -> Fetch:
        """Ask an owner for the longest prefix of these blocks that it holds, and read it; errors as `fetch`.

        `reserve` is called with the number of blocks that it offers; a failure with cause `revoked` means it has none.
        `request_id` says whose prompt it is for, to the owner's log.
        """
        fetch = self.fetch(
            transfer_id, owner_peer_id, hashes, reserve, owner_incarnation, may_be_fewer=True, stage_s=stage_s
        )
        if not fetch.has_result:
            self._sessions.owners[owner_peer_id].want(transfer_id, hashes, request_id)
        return fetch

    def tell_have(
        self, owner_peer_id: str, address: str, parent_hash: BlockHash | None, hashes: Sequence[BlockHash]
    ) -> None:
        """Tell an owner that we hold this run of chained blocks and lend it at `address`: it may fetch it from there.

        Raises `PeerLost` where we have no connection to the owner.
        """
        session = self._sessions.owner(owner_peer_id)
        if session is None:
            raise PeerLost(f"{owner_peer_id} is not connected, and cannot be told of {len(hashes)} blocks")
        session.connection.send(Have(address, parent_hash, list(hashes[:MAX_HASHES])))


def _describe(session: ReaderSession | OwnerSession) -> dict[str, object]:
    return {
        "peer_id": session.peer.peer_id,
        "role": session.peer.role,
        "incarnation": session.peer.incarnation,
        "transport": session.transport_name,
        "lane": session.link.lane,
        "connected": session.connection.is_open,
    }
