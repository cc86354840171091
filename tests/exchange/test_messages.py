"""Frames on the wire: what we send is read back, and nothing else is."""

import msgspec
import pytest

from kvstore.errors import ProtocolViolation
from kvstore.protocol import (
    LENGTH_BYTES,
    AnnouncedBlock,
    Choose,
    Have,
    Hello,
    Prove,
    Ready,
    Reject,
    Revoke,
    Take,
    TransportOffer,
    Want,
    Welcome,
    decode,
    decode_length,
    encode,
)
from kvstore.protocol.messages import (
    MAX_FRAME_BYTES,
    Announce,
    Confirm,
    Confirmed,
    Heartbeat,
    Offer,
    ReadGranted,
    ReadRefused,
    ReadRequest,
    Release,
)

TRANSFER = bytes(range(16))
MESSAGES = [
    Hello(
        1,
        "decode-0",
        "decode",
        "i1",
        {"num_layers": 2, "dtype": "float32"},
        [TransportOffer("ucxx", b"\x01")],
        ["f"],
        TRANSFER,
        [bytes(8)],
    ),
    Prove(bytes(32)),
    Welcome(bytes(range(32)), [TransportOffer("ucxx", b"\x01")]),
    Reject("dtype: ours float32, theirs bfloat16"),
    Choose("nixl", bytes(16)),
    Choose("nixl", bytes(16), "cma"),
    Ready(),
    Heartbeat([TRANSFER, b"other"]),
    Offer(TRANSFER, 3),
    Announce(TRANSFER, 1, [AnnouncedBlock(5, bytes(16), 2**64 - 1), AnnouncedBlock(0, None, 0)], True),
    ReadRequest(7, TRANSFER, [(0, 2), (4, 1)]),
    ReadGranted(7),
    ReadRefused(8, "no such lease"),
    Confirm(TRANSFER),
    Confirmed(TRANSFER, True),
    Release(TRANSFER, "aborted"),
    Revoke(TRANSFER, "lease expired"),
    Want(TRANSFER, [bytes(16), TRANSFER]),
    Want(TRANSFER, [TRANSFER], "chatcmpl-7"),
    Take(TRANSFER),
    Have("127.0.0.1:5002", None, [TRANSFER]),
    Have("127.0.0.1:5002", bytes(16), [TRANSFER, bytes(16)]),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message):
    frame = encode(message)
    assert decode_length(frame[:LENGTH_BYTES]) == len(frame) - LENGTH_BYTES
    assert decode(frame[LENGTH_BYTES:]) == message


@pytest.mark.parametrize("num_bytes", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_lengths_out_of_bounds_are_refused_before_anything_is_read(num_bytes):
    with pytest.raises(ProtocolViolation, match=str(num_bytes)):
        decode_length(num_bytes.to_bytes(4, "big"))


def wire(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x91" * 3000,  # nested without end
        b"\xdf\xff\xff\xff\xff",  # a map that claims four billion entries
        b"\xc6\xff\xff\xff\xff",  # bytes that claim four billion
        wire(type="bogus"),
        wire(type="offer"),
        wire(type="offer", transfer_id=TRANSFER, num_blocks=-1),
        wire(type="offer", transfer_id=TRANSFER, num_blocks=True),
        wire(type="offer", transfer_id="text", num_blocks=1),
        wire(type="offer", transfer_id=b"", num_blocks=1),
        wire(type="offer", transfer_id=bytes(65), num_blocks=1),
        wire(type="read_request", read_id=1, transfer_id=TRANSFER, runs=[[0]]),
        wire(type="read_request", read_id=1, transfer_id=TRANSFER, runs=[[0, 0]]),
        wire(type="announce", transfer_id=TRANSFER, first_index=0, blocks=[[1, b"short", 0]], last=False),
        wire(type="choose", transport="ucxx", link_id=bytes(15)),
        wire(type="prove", mac=bytes(31)),
        wire(type="welcome", mac=bytes(33), transports=[]),
        wire(type="confirmed", transfer_id=TRANSFER, held=1),
        wire(type="want", transfer_id=TRANSFER, hashes=[], request_id="x" * 257),
        encode(Ready())[LENGTH_BYTES:] + b"\x00",
        encode(MESSAGES[0])[LENGTH_BYTES:-1],
    ],
    ids=lambda body: body[:24].hex() or "empty",
)
def test_garbage_is_a_violation_and_never_a_crash(body):
    with pytest.raises(ProtocolViolation, match="no message"):
        decode(body)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_newer_peers_message_with_more_fields_is_read_without_them(message):
    fields = msgspec.to_builtins(message, builtin_types=(bytes,)) | {"shiny": {"more": [b"x", None]}, "zz": 1}
    if "blocks" in fields:
        fields["blocks"] = [(*block, "and more") for block in fields["blocks"]]
    assert decode(msgspec.msgpack.encode(fields)) == message


def test_a_newer_peers_hello_with_more_fields_can_be_read_so_that_it_can_be_refused_by_version():
    fields = msgspec.to_builtins(MESSAGES[0], builtin_types=(bytes,)) | {
        "protocol_version": 7,
        "shiny": 1,
        "transports": [],
    }
    hello = decode(msgspec.msgpack.encode(fields))
    assert isinstance(hello, Hello)
    assert hello.protocol_version == 7


def test_an_older_peer_reads_our_want_without_a_request_and_its_hello_names_no_features():
    assert msgspec.msgpack.decode(encode(Want(TRANSFER, [TRANSFER]))[LENGTH_BYTES:]) == {
        "type": "want",
        "transfer_id": TRANSFER,
        "hashes": [TRANSFER],
    }
    fields = msgspec.to_builtins(MESSAGES[0], builtin_types=(bytes,)) | {"transports": []}
    del fields["features"]
    hello = decode(msgspec.msgpack.encode(fields))
    assert isinstance(hello, Hello)
    assert hello.features == []


def test_a_message_too_large_for_a_frame_is_our_error():
    with pytest.raises(ValueError, match="frame limit"):
        encode(Heartbeat([bytes(64)] * 70_000))
