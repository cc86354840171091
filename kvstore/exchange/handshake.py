"""Exchanges a connection's first messages: who we are, whether our blocks fit, which transport serves.

reader                                owner
  | Hello(identity, transports) ----->  |
  |  <----- Hello(identity, transports) |   a refused side's Hello offers no transport, and Reject follows
  | Choose(transport, link_id) ------>  |
  |  both make their end of the link    |
  | Ready -------------> <-------- Ready|
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvstore.block import BlockLayout
from kvstore.errors import ExchangeError, IncompatibleLayout, IncompatiblePeer, InvalidLayout, ProtocolViolation
from kvstore.exchange.framing import FrameStream
from kvstore.protocol import FEATURES, PROTOCOL_VERSION, Choose, Hello, Message, Ready, Reject, TransportOffer
from kvstore.transport import Link, LinkPeer, Transport, choose

_Expected = TypeVar("_Expected", bound=Message)


@dataclass(frozen=True)
class PeerIdentity:
    """A worker's identity. `incarnation` differs for each start of the process."""

    peer_id: str
    role: str
    incarnation: str
    layout: BlockLayout


@dataclass(frozen=True)
class Introduction:
    """The findings of a handshake, and the link that it made. `features`: those of `FEATURES` that the peer knows."""

    peer: PeerIdentity
    transport: Transport
    link: Link
    features: frozenset[str] = frozenset()


async def introduce_as_reader(
    stream: FrameStream, us: PeerIdentity, transports: Sequence[Transport], link_id: bytes
) -> Introduction:
    """Run the side that dialled. Raises `ExchangeError`, `IncompatiblePeer` being one; the caller closes the stream.

    `link_id`: 16 bytes that name the link to both sides.
    """
    # Nobody reads from a reader over this connection: its Hello names its transports and gives no way in.
    transports = _usable(transports)
    stream.send(_hello(us, [TransportOffer(transport.name, b"") for transport in transports]))
    hello = await _expect(stream, Hello)
    try:
        peer = check_peer(us, hello)
        offers = {offer.name: offer.descriptor for offer in hello.transports}
        transport, _ = choose(transports, offers, peer.peer_id)
    except IncompatiblePeer as error:
        stream.send(Reject(str(error)[:4096]))
        raise
    stream.send(Choose(transport.name, link_id))
    link_peer = LinkPeer(peer.peer_id, offers[transport.name], link_id, stream.peer_host, dialled=True)
    return await _link_up(stream, peer, transport, link_peer, hello)


async def introduce_as_owner(stream: FrameStream, us: PeerIdentity, transports: Sequence[Transport]) -> Introduction:
    """Run the side that accepted. Raises like the other side; the caller closes the stream."""
    hello = await _expect(stream, Hello)
    transports = _usable(transports)
    try:
        peer = check_peer(us, hello)
    except IncompatiblePeer as error:
        stream.send(_hello(us, []))  # with our layout, so that the other side can name both values, but no way in
        stream.send(Reject(str(error)[:4096]))
        raise
    stream.send(_hello(us, [TransportOffer(transport.name, transport.descriptor()) for transport in transports]))
    choice = await _expect(stream, Choose)
    transport = next((ours for ours in transports if ours.name == choice.transport), None)
    if transport is None or choice.transport not in {offer.name for offer in hello.transports}:
        raise ProtocolViolation(f"{peer.peer_id} chose transport {choice.transport!r}, which is not offered both ways")
    link_peer = LinkPeer(peer.peer_id, b"", choice.link_id, stream.peer_host, dialled=False)
    return await _link_up(stream, peer, transport, link_peer, hello)


def check_peer(us: PeerIdentity, hello: Hello) -> PeerIdentity:
    """Return the peer that a Hello introduces. Raises `IncompatiblePeer` with both sides' values."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise IncompatiblePeer(
            f"{hello.peer_id} speaks block protocol {hello.protocol_version}, {us.peer_id} speaks {PROTOCOL_VERSION}"
        )
    if hello.peer_id == us.peer_id:
        raise IncompatiblePeer(
            f"two workers are called {us.peer_id}: ours is incarnation {us.incarnation}, theirs {hello.incarnation}"
        )
    try:
        layout = BlockLayout.from_wire(hello.layout)
        us.layout.check_compatible(layout, hello.peer_id)
    except (InvalidLayout, IncompatibleLayout) as error:
        raise IncompatiblePeer(f"{us.peer_id}: {error}") from error
    return PeerIdentity(hello.peer_id, hello.role, hello.incarnation, layout)


def _usable(transports: Sequence[Transport]) -> list[Transport]:
    return [transport for transport in transports if transport.problem() is None]


def _hello(us: PeerIdentity, offers: list[TransportOffer]) -> Hello:
    return Hello(PROTOCOL_VERSION, us.peer_id, us.role, us.incarnation, us.layout.to_wire(), offers, list(FEATURES))


async def _link_up(
    stream: FrameStream, peer: PeerIdentity, transport: Transport, link_peer: LinkPeer, hello: Hello
) -> Introduction:
    link = await transport.connect(link_peer)
    try:
        if link_peer.dialled:
            stream.send(Ready())
            await _expect(stream, Ready)
        else:
            # The owner's comes last, and no other code runs before its session is installed: when a reader's connect()
            # returns, the owner can open leases for it.
            await _expect(stream, Ready)
            stream.send(Ready())
    except (ExchangeError, asyncio.CancelledError):
        await link.close()
        raise
    return Introduction(peer, transport, link, frozenset(hello.features).intersection(FEATURES))


async def _expect(stream: FrameStream, expected: type[_Expected]) -> _Expected:
    message = await stream.receive()
    if isinstance(message, Reject):
        raise IncompatiblePeer(f"{stream.peer_address} refuses us: {message.reason}")
    if not isinstance(message, expected):
        raise ProtocolViolation(f"{type(message).__name__} where {expected.__name__} belongs")
    return message
