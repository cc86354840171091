"""What somebody gets who reaches a block-protocol port without the peer secret: nothing, and he disturbs nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from kvstore.block import BlockHash
from kvstore.errors import IncompatiblePeer, PeerUnreachable, UnprovenPeer
from kvstore.exchange import ExchangeObserver
from kvstore.peer_keys import PeerKeys, Transcript
from kvstore.protocol import (
    LENGTH_BYTES,
    AnnouncedBlock,
    Choose,
    Have,
    Hello,
    Prove,
    Ready,
    Reject,
    Want,
    Welcome,
    encode,
)
from tests.exchange.exchange_worker import PEER_KEY, TRANSFER, Worker, room, running
from tests.exchange.scripted_peer import BOUND_S, Script, dialled, hello, scripted_owner
from tests.memory_transport import Switchboard
from tests.waiting import until

OTHER_KEY = b"some other secret's key " * 2
HASH = BlockHash(bytes(range(16)))


class Lender:
    """Lends a block to whoever may ask."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def lend_prefix(self, hashes: list[BlockHash]) -> list[AnnouncedBlock]:
        self.num_asked += 1
        return []

    async def take_back(self, blocks: object) -> None: ...

    async def recheck(self, hashes: object) -> None:
        self.num_asked += 1


class Seen(ExchangeObserver):
    """Counts what the metrics count."""

    def __init__(self) -> None:
        self.connected: list[str] = []
        self.unproven: list[str] = []

    def peer_connected(self, peer_id: str, transport: str, lane: str, we_read: bool) -> None:
        self.connected.append(peer_id)

    def peer_unproven(self, address: str, reason: str) -> None:
        self.unproven.append(reason)


class Target:
    """A worker that somebody attacks, and all that an attack could reach."""

    def __init__(self, name: str = "store-0", keys: tuple[bytes, ...] = (PEER_KEY,)) -> None:
        self.lender, self.seen = Lender(), Seen()
        self.heard: list[Have] = []
        self.switchboard = Switchboard()
        self.worker = Worker(
            name,
            self.switchboard,
            keys=keys,
            lender=self.lender,
            observer=self.seen,
            on_have=lambda _, have: self.heard.append(have),
        )

    def check_untouched(self) -> None:
        assert (self.lender.num_asked, self.heard, self.seen.connected) == (0, [], [])


async def knock(script: Script, ours: Hello, proof_key: bytes | None = None) -> None:
    """Dial in as a reader does, with a proof by this key or with none, and go on without waiting for a welcome."""
    script.stream.send(ours)
    theirs = await script.stream.receive_body()
    assert msgspec.msgpack.decode(theirs)["transports"] == [{"name": "memory", "descriptor": b""}]
    if proof_key is not None:
        script.stream.send(Prove(Transcript(proof_key, encode(ours)[LENGTH_BYTES:], theirs).proof("dialler")))
    for message in (
        Choose("memory", bytes(16)),
        Ready(),
        Have("127.0.0.1:1", None, [HASH]),
        Want(TRANSFER, [HASH]),
    ):
        script.stream.send(message)


def under(name: bytes | None) -> Hello:
    """A Hello that names this key."""
    return msgspec.structs.replace(hello(), key_ids=PeerKeys(() if name is None else (name,)).ids)


UNPROVEN: dict[str, tuple[Hello, bytes | None]] = {
    "no proof": (under(PEER_KEY), None),
    "another secret": (under(OTHER_KEY), OTHER_KEY),
    "another secret under our key's name": (under(PEER_KEY), OTHER_KEY),
    "no secret, as on loopback": (under(None), b""),
    "no secret under our key's name": (under(PEER_KEY), b""),
    "no key at all": (msgspec.structs.replace(hello(), key_ids=[]), b""),
}


@pytest.mark.parametrize("attack", UNPROVEN)
async def test_a_stranger_offers_nothing_gets_nothing_and_learns_no_way_in(attack: str) -> None:
    target = Target()
    async with running(target.worker), dialled(target.worker) as script:
        await knock(script, *UNPROVEN[attack])
        rest = await read_all(script)
        target.check_untouched()
        assert b"welcome" not in rest
        assert target.worker.transport.descriptor() not in rest


async def test_who_has_the_secret_is_heard() -> None:
    """The attack above, by a peer: so it would show if it were let through."""
    target = Target()
    async with running(target.worker), dialled(target.worker) as script:
        await script.introduce_as_reader()
        script.stream.send(Have("127.0.0.1:1", None, [HASH]))
        script.stream.send(Want(TRANSFER, [HASH]))
        await until(lambda: target.lender.num_asked and target.heard)


async def read_all(script: Script) -> bytes:
    rest = b""
    async with asyncio.timeout(BOUND_S):
        try:
            while data := await script.stream._reader.read(1 << 16):
                rest += data
        except OSError:
            pass
    return rest


async def test_an_impostor_does_not_push_the_real_connection_out() -> None:
    target = Target("prefill-0")
    real = Worker("decode-0", target.switchboard)
    async with running(target.worker, real):
        await real.exchange.connect(target.worker.exchange.address)
        connection = target.worker.exchange._peers.reader("decode-0")
        for incarnation in ("decode-0-1", "decode-0-0", "zzz"):
            async with dialled(target.worker) as script:
                await knock(script, hello(peer_id="decode-0", incarnation=incarnation), b"guessed")
                await script.read_until_closed()
        assert target.seen.connected == ["decode-0"]
        assert connection is target.worker.exchange._peers.reader("decode-0") is not None


@pytest.mark.parametrize(("before", "after"), [("1", "2"), ("2", "1")], ids=["clock goes on", "clock set back"])
async def test_the_start_of_a_peer_that_proves_itself_last_replaces_the_one_before(before: str, after: str) -> None:
    target = Target("prefill-0")
    first, second = (Worker("decode-0", target.switchboard, incarnation=name) for name in (before, after))
    async with running(target.worker, first, second):
        await first.exchange.connect(target.worker.exchange.address)
        await second.exchange.connect(target.worker.exchange.address)
        assert [each.peer.incarnation for each in target.worker.exchange._peers.readers.values()] == [after]


@asynccontextmanager
async def relay(to: Worker, change: Callable[[bool, int, bytes], bytes]) -> AsyncIterator[str]:
    """Stands between two peers and sees, and may change, each frame: (whether of the reader, its number, the frame)."""
    host, _, port = to.exchange.address.rpartition(":")
    writers: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None]] = []

    async def pump(is_reader: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        try:
            while True:
                head = await reader.readexactly(LENGTH_BYTES)
                frame = head + await reader.readexactly(int.from_bytes(head, "big"))
                writer.write(change(is_reader, number, frame))
                number += 1
        except (asyncio.IncompleteReadError, OSError):
            writer.transport.abort()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, to_writer))
        tasks.append(asyncio.ensure_future(pump(False, to_reader, writer)))
        await pump(True, reader, to_writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_was_recorded_of_a_peer_cannot_be_replayed() -> None:
    target = Target("prefill-0")
    peer = Worker("decode-0", target.switchboard)
    recorded: list[bytes] = []

    def record(is_reader: bool, number: int, frame: bytes) -> bytes:
        if is_reader:
            recorded.append(frame)
        return frame

    async with running(target.worker, peer), relay(target.worker, record) as address:
        await peer.exchange.connect(address)
        await peer.exchange.close()
        await until(lambda: not target.worker.exchange._peers.undrained)
        async with dialled(target.worker) as script:
            for frame in recorded:
                script.writer.write(frame)
            assert b"welcome" not in await read_all(script)
        assert target.seen.connected == ["decode-0"]
        assert target.seen.unproven == ["decode-0 has not proven itself"]


async def test_a_readers_own_proof_is_not_an_owners() -> None:
    """Reflected: who dials us out of turn gets back what he has sent, and takes it for an owner's."""
    seen: list[bytes] = []

    async def reflect(script: Script) -> None:
        theirs = await script.stream.receive_body()
        fields = msgspec.msgpack.decode(theirs) | {"peer_id": "prefill-0"}
        script.stream.send(msgspec.convert(fields, Hello))
        prove = await script.expect(Prove)
        script.stream.send(Welcome(prove.mac, []))
        seen.append(prove.mac)

    reader = Worker("decode-0", Switchboard())
    async with running(reader), scripted_owner(reflect) as address:
        with pytest.raises(UnprovenPeer, match="prefill-0 has not proven itself"):
            await reader.exchange.connect(address)
    assert seen


def in_hello(**changes: object) -> Callable[[bytes], bytes]:
    def change(frame: bytes) -> bytes:
        body = msgspec.msgpack.encode(msgspec.msgpack.decode(frame[LENGTH_BYTES:]) | changes)
        return len(body).to_bytes(LENGTH_BYTES, "big") + body

    return change


@pytest.mark.parametrize("of_reader", [True, False], ids=["the reader's hello", "the owner's hello"])
@pytest.mark.parametrize(
    "changes",
    [
        {"incarnation": "another"},
        {"role": "store"},
        {"features": ["shiny"]},
        {"transports": []},
        {"nonce": bytes(16)},
        {"more": "than we know"},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_who_stands_between_two_peers_changes_nothing_of_what_they_say_of_themselves(
    changes: dict[str, object], of_reader: bool
) -> None:
    target = Target("prefill-0")
    peer, alter = Worker("decode-0", target.switchboard), in_hello(**changes)

    def change(is_reader: bool, number: int, frame: bytes) -> bytes:
        return alter(frame) if number == 0 and is_reader is of_reader else frame

    async with running(target.worker, peer), relay(target.worker, change) as address:
        with pytest.raises((IncompatiblePeer, PeerUnreachable)):
            await peer.exchange.connect(address)
        target.check_untouched()


async def test_who_stands_between_two_peers_cannot_send_the_reader_elsewhere_for_the_blocks() -> None:
    target = Target("prefill-0")
    peer = Worker("decode-0", target.switchboard)

    def change(is_reader: bool, number: int, frame: bytes) -> bytes:
        if is_reader or number != 1:
            return frame
        return in_hello(transports=[{"name": "memory", "descriptor": b"elsewhere"}])(frame)

    async with running(target.worker, peer), relay(target.worker, change) as address:
        with pytest.raises(UnprovenPeer, match="prefill-0 has not proven itself"):
            await peer.exchange.connect(address)


@pytest.mark.parametrize("what", ["forged", "repeated", "dropped", "flipped"])
async def test_who_stands_between_two_peers_cannot_speak_for_them_later(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target("prefill-0")
    peer, is_on = Worker("decode-0", target.switchboard), False
    held: list[bytes] = []

    def change(is_reader: bool, number: int, frame: bytes) -> bytes:
        if not is_reader or not is_on:
            return frame
        if what == "forged":
            return frame + encode(Have("127.0.0.1:1", None, [HASH]))
        if what == "repeated":
            return frame + frame
        if what == "dropped":
            held.append(frame)
            return b"" if len(held) == 1 else frame
        return frame[:-1] + bytes([frame[-1] ^ 1])

    async with running(target.worker, peer), relay(target.worker, change) as address:
        await peer.exchange.connect(address)
        await asyncio.sleep(0)
        is_on = True
        await until(lambda: not target.worker.exchange.is_connected("decode-0"))
    assert "that the peer has not sealed" in caplog.text
    assert (target.heard, target.lender.num_asked) == ([], 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ((PEER_KEY,), (), "prefill-0 has a peer secret, and we have none"),
        ((), (PEER_KEY,), "prefill-0 has no peer secret"),
        ((PEER_KEY,), (OTHER_KEY,), "prefill-0 has another peer secret"),
    ],
)
async def test_peers_without_a_secret_in_common_say_so(
    ours: tuple[bytes, ...], theirs: tuple[bytes, ...], why: str
) -> None:
    target = Target("prefill-0", keys=ours)
    peer = Worker("decode-0", target.switchboard, keys=theirs)
    async with running(target.worker, peer):
        with pytest.raises(UnprovenPeer, match=why):
            await peer.exchange.connect(target.worker.exchange.address)
        target.check_untouched()


NEW = b"the secret's successor's key" * 2


@pytest.mark.parametrize(
    ("owner", "reader"),
    [
        ((PEER_KEY, NEW), (PEER_KEY,)),
        ((PEER_KEY, NEW), (NEW, PEER_KEY)),
        ((NEW,), (PEER_KEY, NEW)),
        ((), ()),
        ((NEW, PEER_KEY), (PEER_KEY, NEW)),
    ],
)
async def test_peers_with_one_secret_in_common_connect_while_it_is_changed(
    owner: tuple[bytes, ...], reader: tuple[bytes, ...]
) -> None:
    switchboard = Switchboard()
    one, other = Worker("prefill-0", switchboard, keys=owner), Worker("decode-0", switchboard, keys=reader)
    async with running(one, other):
        await other.exchange.connect(one.exchange.address)
        fetch = other.exchange.fetch(TRANSFER, "prefill-0", [None], room([5]))
        lease = one.exchange.open_lease(TRANSFER, "decode-0", 1)
        lease.announce(0, one.announced([3], [None]), last=True)
        assert (await fetch.result).ok


async def test_strangers_write_one_line_however_often_they_come(caplog: pytest.LogCaptureFixture) -> None:
    target = Target()
    async with running(target.worker):
        for _ in range(20):
            async with dialled(target.worker) as script:
                await knock(script, hello(), b"guessed")
                assert (await script.expect(Reject)).reason == "script-0 has not proven itself"
        await until(lambda: len(target.seen.unproven) == 20)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


async def test_a_newer_peer_with_more_fields_and_an_unknown_feature_is_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("prefill-0")
    ours = msgspec.to_builtins(msgspec.structs.replace(hello(), features=["shiny", "suspect"]), builtin_types=(bytes,))
    body = msgspec.msgpack.encode(ours | {"shiny": {"more": [1, 2]}})
    async with running(target.worker), dialled(target.worker) as script:
        await script.introduce_as_reader(body)
        assert target.worker.exchange.is_connected("script-0")
