"""Exchanges a connection's first messages: who we are, proven; whether our blocks fit; which transport serves.

reader                                    owner
  | Hello(identity, nonce, key ids) ----->  |
  |  <----- Hello(identity, nonce, key ids) |   another version, or no key in common: Reject follows
  | Prove(mac) -------------------------->  |   wrong: Reject. Until here nothing of the owner has been touched
  |  <------------ Welcome(mac, transports) |   wrong: the reader leaves. Blocks that do not fit: Reject instead
  | Choose(transport, link_id, lane) ---->  |   from here on each frame is sealed
  |  both make their end of the link        |
  | Ready -----------------> <-------- Ready|
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from kvstore.block import BlockLayout
from kvstore.errors import (
    IncompatibleLayout,
    IncompatiblePeer,
    InvalidLayout,
    ProtocolViolation,
    UnprovenPeer,
)
from kvstore.exchange.framing import FrameStream
from kvstore.peer_keys import PeerKeys, Transcript
from kvstore.protocol import (
    CHOICES_NAME_LANES,
    FEATURES,
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    PROTOCOL_VERSION,
    Choose,
    Hello,
    Message,
    Prove,
    Ready,
    Reject,
    TransportOffer,
    Welcome,
    decode,
    encode,
)
from kvstore.transport import Link, LinkPeer, Transport, choose

_Expected = TypeVar("_Expected", bound=Message)
NewId: TypeAlias = Callable[[], bytes]
"""Makes 16 random bytes, never the same twice: nonces, names of links."""


@dataclass(frozen=True)
class PeerIdentity:
    """A worker's identity. `incarnation` differs for each start of the process."""

    peer_id: str
    role: str
    incarnation: str
    layout: BlockLayout


@dataclass(frozen=True)
class Ourselves:
    """Who we are, and by what we prove it."""

    identity: PeerIdentity
    keys: PeerKeys


@dataclass(frozen=True)
class Introduction:
    """The findings of a handshake, and the link that it made. `features`: those of `FEATURES` that the peer knows."""

    peer: PeerIdentity
    transport: Transport
    link: Link
    features: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Side:
    """What one side brings to one handshake."""

    us: Ourselves
    transports: Sequence[Transport]
    new_id: NewId
    on_proven: Callable[[PeerIdentity], None]
    """Hears, before anything is given to it, that a peer is who it says. Raises `IncompatiblePeer` to refuse it."""
    on_chosen: Callable[[str], None]
    """Hears by its name over which transport a link is about to be made."""

    def usable(self) -> list[Transport]:
        """The transports that work at present."""
        return [transport for transport in self.transports if transport.problem() is None and not transport.is_still]


async def introduce_as_reader(stream: FrameStream, side: Side) -> Introduction:
    """Run the side that dialled. Raises `ExchangeError`, `IncompatiblePeer` being one; the caller closes the stream."""
    # Nobody reads from a reader over this connection: it names its transports and gives no way in.
    us, transports = side.us, side.usable()
    ours = _send_hello(stream, us, transports, side.new_id())
    hello, theirs = await _receive_hello(stream)
    peer_id = check_version(us.identity, hello)
    key = us.keys.shared(hello.key_ids, us.keys.ids)
    if key is None:
        raise UnprovenPeer(us.keys.why_none(peer_id, hello.key_ids))
    transcript = Transcript(key, ours, theirs)
    stream.send(Prove(transcript.proof("dialler")))
    try:
        welcome = await _expect(stream, Welcome)
    except IncompatiblePeer:
        check_peer(us.identity, hello)  # which says in our words what the owner has against us
        raise
    if not transcript.holds(welcome.mac, "listener", *_flat(welcome.transports)):
        raise UnprovenPeer(f"{peer_id} has not proven itself")
    stream.seal(transcript.seal("dialler"), transcript.seal("listener"))
    try:
        peer = check_peer(us.identity, hello)
        side.on_proven(peer)
        offers = {offer.name: offer.descriptor for offer in welcome.transports}
        transport, lane = choose(transports, offers, peer.peer_id)
    except IncompatiblePeer as error:
        stream.send(Reject(str(error)[:4096]))
        raise
    link_id = side.new_id()
    stream.send(Choose(transport.name, link_id, lane if CHOICES_NAME_LANES in hello.features else ""))
    link_peer = LinkPeer(peer.peer_id, offers[transport.name], link_id, stream.peer_host, dialled=True, lane=lane)
    side.on_chosen(transport.name)
    return await _link_up(stream, peer, transport, link_peer, hello)


async def introduce_as_owner(stream: FrameStream, side: Side) -> Introduction:
    """Run the side that accepted. Raises like the other side; the caller closes the stream."""
    hello, theirs = await _receive_hello(stream)
    us, transports = side.us, side.usable()
    # With our version and layout, so that the other side can name both values of whatever differs.
    ours = _send_hello(stream, us, transports, side.new_id())
    try:
        peer_id = check_version(us.identity, hello)
        key = us.keys.shared(us.keys.ids, hello.key_ids)
        if key is None:
            raise UnprovenPeer(us.keys.why_none(peer_id, hello.key_ids))
        transcript = Transcript(key, theirs, ours)
        if not transcript.holds((await _expect(stream, Prove, MAX_HELLO_BYTES)).mac, "dialler"):
            raise UnprovenPeer(f"{peer_id} has not proven itself")
        peer = check_peer(us.identity, hello)
        side.on_proven(peer)
    except IncompatiblePeer as error:
        stream.send(Reject(str(error)[:4096]))
        raise
    offers = [TransportOffer(transport.name, transport.descriptor()) for transport in transports]
    stream.send(Welcome(transcript.proof("listener", *_flat(offers)), offers))
    stream.seal(transcript.seal("listener"), transcript.seal("dialler"))
    choice = await _expect(stream, Choose)
    transport = next((ours for ours in transports if ours.name == choice.transport), None)
    if transport is None or choice.transport not in {offer.name for offer in hello.transports}:
        raise ProtocolViolation(f"{peer.peer_id} chose transport {choice.transport!r}, which is not offered both ways")
    link_peer = LinkPeer(peer.peer_id, b"", choice.link_id, stream.peer_host, dialled=False, lane=choice.lane)
    side.on_chosen(transport.name)
    return await _link_up(stream, peer, transport, link_peer, hello)


def check_version(us: PeerIdentity, hello: Hello) -> str:
    """Return the name that a Hello gives. Raises `IncompatiblePeer` where we could not go on to understand it."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise IncompatiblePeer(
            f"{hello.peer_id} speaks block protocol {hello.protocol_version}, {us.peer_id} speaks {PROTOCOL_VERSION}"
        )
    return hello.peer_id


def check_peer(us: PeerIdentity, hello: Hello) -> PeerIdentity:
    """Return the peer that a Hello introduces. Raises `IncompatiblePeer` with both sides' values."""
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


def _send_hello(stream: FrameStream, us: Ourselves, transports: Sequence[Transport], nonce: bytes) -> bytes:
    """Return the message as it goes out."""
    who, layout = us.identity, us.identity.layout.to_wire()
    names = [TransportOffer(transport.name, b"") for transport in transports]
    about = (who.peer_id, who.role, who.incarnation, layout, names, list(FEATURES))
    hello = Hello(PROTOCOL_VERSION, *about, nonce, us.keys.ids)
    stream.send(hello)
    return encode(hello)[LENGTH_BYTES:]


async def _receive_hello(stream: FrameStream) -> tuple[Hello, bytes]:
    """Return the message, and as it came: with fields that we do not know, which the proof includes."""
    body = await stream.receive_body(MAX_HELLO_BYTES)
    return _expected(stream, decode(body), Hello), body


def _flat(offers: Sequence[TransportOffer]) -> list[bytes]:
    return [part for offer in offers for part in (offer.name.encode(), offer.descriptor)]


async def _link_up(
    stream: FrameStream, peer: PeerIdentity, transport: Transport, link_peer: LinkPeer, hello: Hello
) -> Introduction:
    # Both at once: nobody goes on making a link to a peer that has left.
    making, ready = asyncio.ensure_future(transport.connect(link_peer)), asyncio.ensure_future(_expect(stream, Ready))
    try:
        await asyncio.wait([making, ready], return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            ready.result()
        link = await making
        if link_peer.dialled:
            stream.send(Ready())
            await ready
        else:
            # The owner's comes last, and no other code runs before its session is installed: when a reader's connect()
            # returns, the owner can open leases for it.
            await ready
            stream.send(Ready())
    except BaseException:
        making.cancel()
        ready.cancel()
        made, _ = await asyncio.gather(making, ready, return_exceptions=True)
        if not isinstance(made, BaseException):
            await made.close()
        raise
    return Introduction(peer, transport, link, frozenset(hello.features).intersection(FEATURES))


async def _expect(stream: FrameStream, expected: type[_Expected], max_bytes: int = MAX_FRAME_BYTES) -> _Expected:
    return _expected(stream, decode(await stream.receive_body(max_bytes)), expected)


def _expected(stream: FrameStream, message: Message, expected: type[_Expected]) -> _Expected:
    if isinstance(message, Reject):
        raise IncompatiblePeer(f"{stream.peer_address} refuses us: {message.reason}")
    if not isinstance(message, expected):
        raise ProtocolViolation(f"{type(message).__name__} where {expected.__name__} belongs")
    return message
