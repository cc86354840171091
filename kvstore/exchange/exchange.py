"""The block protocol's face: one exchange per process, living in its event loop.

There is one connection per (reader, owner) pair (`peer_sessions`): whoever wants to read dials, and over that
connection only reads. Two workers that read from each other have two, so simultaneous dialling both ways needs no
tie-break. A connection's death ends every lease and fetch on it. Three layers: this shell (with `connection`, `reader`
and `owner`) does I/O, a session (`session`) knows one connection, a machine (`fetch`, `lease`) one transfer's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence

from kvstore.block import BlockHash, BlockMemory, ProofKey
from kvstore.errors import PeerLost, TransportError
from kvstore.exchange.connection import Tools
from kvstore.exchange.framing import Listener, Outside
from kvstore.exchange.handshake import Ourselves, PeerIdentity
from kvstore.exchange.keep import Keep, Keeps
from kvstore.exchange.observer import ExchangeObserver
from kvstore.exchange.owner import Lease, PrefixLender, lend
from kvstore.exchange.peer_sessions import PeerSessions, ToOwner, ToReader
from kvstore.exchange.reader import Fetch, ReserveFunction
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import (
    MAX_HASHES,
    AnnouncedBlock,
    ExchangeTimeouts,
    Have,
    Revoke,
    Suspect,
    Take,
    Want,
)
from kvstore.transport import Transport

logger = logging.getLogger(__name__)

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
        *,
        proof_key: ProofKey | None,
        keys: PeerKeys | None = None,
        outside: Outside | None = None,
        observer: ExchangeObserver | None = None,
        lender: PrefixLender | None = None,
        on_have: OnHave | None = None,
        request_scope: RequestScope | None = None,
    ) -> None:
        """`keys`: by which peers know each other; without one, everybody who has none is a peer.

        `proof_key`: None for whom keeps blocks for others; what it reads is checked by whoever uses it. `outside`: the
        real world by default.
        """
        if memory.block_bytes != identity.layout.block_bytes:
            raise ValueError(
                f"the pool's blocks have {memory.block_bytes} bytes, the layout's {identity.layout.block_bytes}"
            )
        self.identity = identity
        self._outside = outside = outside or Outside()
        self.clock = outside.clock  # of the stamps in a FetchResult
        self.new_id = outside.new_id  # names a transfer
        self._transports = list(transports)
        self._lender = lender
        self._on_have = on_have
        self._request_scope = request_scope or (lambda _: contextlib.nullcontext())
        self._listener: Listener | None = None
        self._timeouts = timeouts or ExchangeTimeouts()
        self._keeps = Keeps()
        self._verifier = outside.threads.pool("kv-verify")

        def make_tools(peers: PeerSessions) -> Tools:
            seen = observer or ExchangeObserver()
            return Tools(
                memory, proof_key, self._timeouts, outside.clock, seen, self._verifier, peers.start_task, self._passed
            )

        ourselves = Ourselves(identity, keys or PeerKeys())
        self._peers = PeerSessions(ourselves, outside, self._transports, make_tools)

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
        self._listener = await self._outside.net.listen(host, port, self._peers.accept)

    @property
    def address(self) -> str:
        """`host:port` that we listen on; empty before."""
        return self._listener.address if self._listener is not None else ""

    async def close(self) -> None:
        """End all connections, leases and fetches, then the transports. Bounded in time; may be called again."""
        if self._listener is not None:
            self._listener.close()
        self._keeps.close()
        await self._peers.close()
        for transport in self._transports:
            await transport.close()
        self._verifier.shutdown(wait=True)

    @property
    def transport_names(self) -> tuple[str, ...]:
        """The transports that could start."""
        return tuple(transport.name for transport in self._transports)

    @property
    def can_move_blocks(self) -> bool:
        """Whether a transport works; where none does, no new peer gets anything from us, nor we from it."""
        return any(transport.problem() is None for transport in self._transports)

    @property
    def gets_on(self) -> bool:
        """Whether blocks can be moved at present: a transport works, and does not stand still."""
        return any(transport.problem() is None and not transport.is_still for transport in self._transports)

    def note_still(self, names: Collection[str]) -> None:
        """The transports of these names stand still, the others get on: nothing new goes over them, what did has ended.

        Blocks that are being read over them stay in quarantine until they get on.
        """
        for transport in self._transports:
            transport.is_still = transport.name in names
        self._peers.leave(names)

    def transport_turns(self) -> dict[str, int]:
        """Return how often each transport that works, and has a thread of its own, has come round. Any thread."""
        turns = {each.name: each.num_turns for each in self._transports if each.problem() is None}
        return {name: number for name, number in turns.items() if number is not None}

    def state(self) -> dict[str, object]:
        """Return what goes on, as plain values, for a debug endpoint."""
        handles = [handle for connection in self._peers.undrained for handle in connection.handles.values()]
        return {
            "address": self.address,
            "transports": {transport.name: _condition(transport) for transport in self._transports},
            "owners": [_describe(connection) for connection in self._peers.owners.values()],
            "readers": [_describe(connection) for connection in self._peers.readers.values()],
            "fetches": [handle.describe() for handle in handles if isinstance(handle, Fetch)],
            "leases": [handle.describe() for handle in handles if isinstance(handle, Lease)],
            "num_kept": len(self._keeps),
        }

    # ---- connections ----

    async def connect(self, address: str) -> str:
        """Connect to an owner of blocks at `host:port`, unless we are; return its peer id.

        Raises `PeerUnreachable`, `IncompatiblePeer` (the message says both sides' values).
        """
        return await self._peers.connect(address)

    def is_connected(self, peer_id: str) -> bool:
        """Whether there is a live connection to this peer, dialled by either side."""
        return self._peers.owner(peer_id) is not None or self._peers.reader(peer_id) is not None

    def lane_to(self, owner_peer_id: str) -> str:
        """Return the lane on which we read from an owner; empty where we are not connected to it."""
        connection = self._peers.owners.get(owner_peer_id)
        return connection.link.lane if connection is not None else ""

    # ---- owner ----

    def open_lease(self, transfer_id: bytes, reader_peer_id: str, num_blocks: int, request_id: str = "") -> Lease:
        """Offer `num_blocks` blocks, to be announced as they are computed, to a reader that has dialled us.

        `request_id` is what `state` names it by. Raises `PeerLost` where it is not connected.
        """
        connection = self._peers.reader(reader_peer_id)
        if connection is None:
            raise PeerLost(f"transfer {transfer_id.hex()}: reader {reader_peer_id} is not connected")
        return Lease(connection, transfer_id, num_blocks, request_id)

    def keep(self, transfer_id: bytes, blocks: Sequence[AnnouncedBlock], request_id: str = "") -> Keep:
        """Keep blocks for whoever names this random id within `lease_ttl_s`; errors none, `request_id` as above."""
        keep = Keep(transfer_id, blocks, request_id)
        self._keeps.add(keep, self._timeouts.lease_ttl_s)
        return keep

    def _passed(self, connection: ToReader, message: Want | Take | Have | Suspect) -> None:
        """A reader speaks to whoever holds the blocks."""
        if isinstance(message, Take):
            self._keeps.take(message.transfer_id, connection)
            return
        if isinstance(message, Have):
            if self._on_have is not None:  # else: we keep nothing for others, and nobody waits for an answer
                # Behind the first step of what messages before it have begun: a doubt holds offers back from there on.
                asyncio.get_running_loop().call_soon(self._on_have, connection.peer, message)
            return
        # A connection's own context is nobody's: without an id nothing is to be named.
        request_id = message.request_id if isinstance(message, Want) else ""
        with self._request_scope(request_id) if request_id else contextlib.nullcontext():
            serving = self._peers.start_task(self._serve(connection, message))
        serving.add_done_callback(lambda _: connection.session.settled())

    async def _serve(self, connection: ToReader, message: Want | Suspect) -> None:
        if self._lender is None:
            if isinstance(message, Want):
                connection.send(Revoke(message.transfer_id, "this worker lends no prefixes"))
        elif isinstance(message, Want):
            await lend(connection, message, self._lender)
        else:
            text = "%s read other bytes than we announced, of %d blocks"
            logger.warning(text, connection.peer.peer_id, len(message.hashes))
            await self._lender.recheck([BlockHash(block_hash) for block_hash in message.hashes])

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

        `expected_hashes`: one per block, None for the partial last one; with `may_be_fewer` a prefix may be offered.
        `reserve(num_blocks)` is called on the Offer and must end in bounded time: a failing fetch does not cancel it (a
        granted reservation would be lost), so whoever aborts a fetch withdraws what it waits for. With
        `owner_incarnation`, a connection to another start of that worker fails the fetch. `stage_s` replaces the
        deadlines of each stage and read. Raises `PeerLost` without a connection, ValueError for a transfer under way.
        """
        connection = self._owner(owner_peer_id, f"for transfer {transfer_id.hex()}")
        machine = connection.session.order(transfer_id, expected_hashes, may_be_fewer, stage_s, self.clock())
        fetch = Fetch(connection, machine, reserve)
        if owner_incarnation is not None:
            connection.do(connection.session.check_start(transfer_id, owner_incarnation, self.clock()))
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
        if fetch.machine.may_succeed:
            connection = self._peers.owners[owner_peer_id]
            connection.do(connection.session.want(transfer_id, hashes, request_id))
        return fetch

    def fetch_kept(
        self,
        transfer_id: bytes,
        owner_peer_id: str,
        expected_hashes: Sequence[BlockHash | None],
        reserve: ReserveFunction,
        owner_incarnation: str | None = None,
    ) -> Fetch:
        """Read the blocks that an owner keeps under this id; arguments and errors as `fetch`.

        A failure with cause `revoked` means that it keeps none, or no more.
        """
        fetch = self.fetch(transfer_id, owner_peer_id, expected_hashes, reserve, owner_incarnation)
        if fetch.machine.may_succeed:
            connection = self._peers.owners[owner_peer_id]
            connection.do(connection.session.take(transfer_id, self.clock()))
        return fetch

    def tell_have(
        self, owner_peer_id: str, address: str, parent_hash: BlockHash | None, hashes: Sequence[BlockHash]
    ) -> None:
        """Tell an owner that we hold this run of chained blocks and lend it at `address`: it may fetch it from there.

        Raises `PeerLost` where we have no connection to the owner.
        """
        connection = self._owner(owner_peer_id, f"to be told of {len(hashes)} blocks")
        connection.send(Have(address, parent_hash, list(hashes[:MAX_HASHES])))

    def _owner(self, peer_id: str, what_for: str) -> ToOwner:
        connection = self._peers.owner(peer_id)
        if connection is None:
            raise PeerLost(f"owner {peer_id} is not connected, {what_for}")
        return connection


def _condition(transport: Transport) -> str:
    return transport.problem() or ("stands still" if transport.is_still else "ok")


def _describe(connection: ToOwner | ToReader) -> dict[str, object]:
    return {
        "peer_id": connection.peer.peer_id,
        "role": connection.peer.role,
        "incarnation": connection.peer.incarnation,
        "transport": connection.transport_name,
        "lane": connection.link.lane,
        "connected": connection.is_open,
    }
