"""Defines the block protocol's control messages, and their form on the wire.

A frame is a 4-byte big-endian length and that many bytes of msgpack: a map whose `type` names the message. What a peer
sends is data: the length is checked before anything is read, and the body against the schema below, field by field.
Fields that we do not know are skipped: a newer peer may send more than we read. A type that we do not know is refused.

On every connection the peer that dialled is the *reader* and the peer that accepted is the *owner* of blocks; each
has its own set of messages, and using the other's is a violation.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgpack
import msgspec

from kvstore.block import Proof
from kvstore.errors import ProtocolViolation

PROTOCOL_VERSION: Final = 2  # 2: peers prove themselves
WANTS_NAME_REQUESTS: Final = "want.request_id"
HEARS_SUSPICIONS: Final = "suspect"
LENDS_KEPT: Final = "take"
CHOICES_NAME_LANES: Final = "choose.lane"
FEATURES: Final = (WANTS_NAME_REQUESTS, HEARS_SUSPICIONS, LENDS_KEPT, CHOICES_NAME_LANES)
"""What was added within this version: optional fields and messages, sent only to a peer whose Hello names them."""
MAX_REQUEST_ID_CHARS: Final = 256
MAX_HASHES: Final = 65536
LENGTH_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 4 * 1024 * 1024
MAX_HELLO_BYTES: Final = 64 * 1024
"""A frame of somebody who has not proven himself."""

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_TransferId = Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)]
_Hash = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]
_ReadId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
_Proof = Annotated[Proof, msgspec.Meta(ge=0)]
_Mac = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class _Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all messages."""


class TransportOffer(msgspec.Struct, frozen=True):
    """One transport that a peer can use. Only that transport reads its descriptor."""

    name: _Name
    descriptor: Annotated[bytes, msgspec.Meta(max_length=1024 * 1024)]


class Hello(_Message, frozen=True, tag="hello"):
    """The first message of both sides: who they say they are, what their blocks are, and by what these can travel.

    `transports` have no descriptors yet. `nonce`: random, new for each connection; `key_ids`: of the keys that the
    sender can prove itself by. Both are empty in a Hello of version 1, which can be read to be refused by its version.
    """

    protocol_version: _Count
    peer_id: _Name
    role: _Name
    incarnation: _Name
    layout: dict[_Name, int | str]
    transports: Annotated[list[TransportOffer], msgspec.Meta(max_length=8)]
    features: Annotated[list[_Name], msgspec.Meta(max_length=64)] = []
    nonce: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    key_ids: Annotated[list[Annotated[bytes, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=8)] = []


class Prove(_Message, frozen=True, tag="prove"):
    """Reader: I have the key, and sent that Hello."""

    mac: _Mac


class Welcome(_Message, frozen=True, tag="welcome"):
    """Owner: so have I; and this is how to reach my pool. The proof includes the transports."""

    mac: _Mac
    transports: Annotated[list[TransportOffer], msgspec.Meta(max_length=8)]


class Reject(_Message, frozen=True, tag="reject"):
    """The sender refuses the connection and closes it."""

    reason: _Text


class Choose(_Message, frozen=True, tag="choose", omit_defaults=True):
    """Reader to owner: the transport of this connection, and the random name of its link.

    `lane`: on which it reads, so that the owner knows whether it has a part in that; empty where the owner does not
    know the field.
    """

    transport: _Name
    link_id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    lane: Annotated[str, msgspec.Meta(max_length=256)] = ""


class Ready(_Message, frozen=True, tag="ready"):
    """Both ways: the sender's end of the transport link is up."""


class Want(_Message, frozen=True, tag="want", omit_defaults=True):
    """Reader: lend the longest prefix of these blocks that you hold; answered by `offer`, or by `revoke` for none.

    `request_id`: whose prompt needs them, for logs; empty where it is nobody's, or the owner does not know the field.
    """

    transfer_id: _TransferId
    hashes: Annotated[list[_Hash], msgspec.Meta(max_length=MAX_HASHES)]
    request_id: Annotated[str, msgspec.Meta(max_length=MAX_REQUEST_ID_CHARS)] = ""


class Take(_Message, frozen=True, tag="take"):
    """Reader: lend the blocks that you keep under this transfer's id; answered by `offer`, or by `revoke` for none.

    Whoever knows the id, 16 random bytes, was told it by the owner, by way of who moves the request.
    """

    transfer_id: _TransferId


class Have(_Message, frozen=True, tag="have"):
    """Reader: I hold this run of chained blocks and lend them at `address`; fetch them if you keep blocks for others.

    `parent` is the block before the first of them, None where the chain begins with it. There is no answer.
    """

    address: _Name
    parent: _Hash | None
    hashes: Annotated[list[_Hash], msgspec.Meta(min_length=1, max_length=MAX_HASHES)]


class Heartbeat(_Message, frozen=True, tag="heartbeat"):
    """Both ways, at a fixed interval: the sender lives. The reader's names the transfers whose leases it renews."""

    transfer_ids: list[_TransferId]


class Offer(_Message, frozen=True, tag="offer"):
    """Owner: a lease for `num_blocks` blocks is open; reserve room for them."""

    transfer_id: _TransferId
    num_blocks: _Count


class AnnouncedBlock(msgspec.Struct, frozen=True, array_like=True):
    """A computed block: its id in the owner's pool, its identity (None: the partial last block), its proof."""

    block_id: _Count
    block_hash: _Hash | None
    proof: _Proof


class Announce(_Message, frozen=True, tag="announce"):
    """Owner: blocks `first_index ...` of the lease are computed and can be read. `last`: there are no more."""

    transfer_id: _TransferId
    first_index: _Count
    blocks: list[AnnouncedBlock]
    last: bool


class ReadRequest(_Message, frozen=True, tag="read_request"):
    """Reader, two-sided transports only: please send these blocks.

    Each run `(first_index, num_blocks)` counts in the lease's block indexes, lies in consecutive blocks of the owner's
    pool, and is sent as one message.
    """

    read_id: _ReadId
    transfer_id: _TransferId
    runs: list[tuple[_Count, Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]]]


class ReadGranted(_Message, frozen=True, tag="read_granted"):
    """Owner: the blocks of this request are pinned and being sent."""

    read_id: _ReadId


class ReadRefused(_Message, frozen=True, tag="read_refused"):
    """Owner: nothing has been or will be sent for this request."""

    read_id: _ReadId
    reason: _Text


class Confirm(_Message, frozen=True, tag="confirm"):
    """Reader: all blocks are here and verified; was the lease held all the time?"""

    transfer_id: _TransferId


class Confirmed(_Message, frozen=True, tag="confirmed"):
    """Owner: the answer. `held` False: discard the blocks."""

    transfer_id: _TransferId
    held: bool


class Release(_Message, frozen=True, tag="release"):
    """Reader: it wants no more of this transfer."""

    transfer_id: _TransferId
    reason: _Text


class Suspect(_Message, frozen=True, tag="suspect"):
    """Reader: the bytes that came of these blocks are not what you announced; look whether yours have changed."""

    hashes: Annotated[list[_Hash], msgspec.Meta(min_length=1, max_length=256)]


class Revoke(_Message, frozen=True, tag="revoke"):
    """Owner: the lease is over; whatever was or is being read must be discarded."""

    transfer_id: _TransferId
    reason: _Text


HandshakeMessage: TypeAlias = Hello | Prove | Welcome | Reject | Choose | Ready
ReaderMessage: TypeAlias = Heartbeat | Want | Take | Have | ReadRequest | Confirm | Suspect | Release
OwnerMessage: TypeAlias = Heartbeat | Offer | Announce | ReadGranted | ReadRefused | Confirmed | Revoke
Message: TypeAlias = HandshakeMessage | ReaderMessage | OwnerMessage


def encode(message: Message) -> bytes:
    """Return the frame of `message`, length included. Raises ValueError where it would exceed `MAX_FRAME_BYTES`."""
    body: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def decode_length(prefix: bytes, max_bytes: int = MAX_FRAME_BYTES) -> int:
    """Return the body length that a frame's first 4 bytes announce. Raises `ProtocolViolation` out of bounds."""
    num_bytes = int.from_bytes(prefix, "big")
    if not 1 <= num_bytes <= max_bytes:
        raise ProtocolViolation(f"a frame of {num_bytes} bytes; 1 to {max_bytes} are allowed")
    return num_bytes


def decode(body: bytes) -> Message:
    """Return the message in a frame's body. Raises `ProtocolViolation` for anything that is not exactly one message."""
    try:
        message: Message = msgspec.convert(msgpack.unpackb(body), Message, builtin_types=(bytes,))
    except (msgpack.UnpackException, msgspec.ValidationError, ValueError, RecursionError) as error:
        raise ProtocolViolation(f"a frame of {len(body)} bytes is no message: {error}") from error
    return message
