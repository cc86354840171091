"""What an exchange makes of peers that die, freeze, stall or talk nonsense: played by a script over a plain socket."""

import asyncio
import gc
import time
from dataclasses import replace

import pytest

from kvstore.errors import PeerUnreachable
from kvstore.exchange.connection import Connection
from kvstore.exchange.handshake import introduce_as_owner
from kvstore.exchange.peer_sessions import PeerSessions
from kvstore.protocol import (
    MAX_HELLO_BYTES,
    AnnouncedBlock,
    FetchCause,
    Hello,
    LeaseOutcome,
    Reject,
    Revoke,
    Want,
    encode,
)
from kvstore.protocol.messages import Announce, Confirm, Confirmed, Heartbeat, Offer
from tests.exchange.exchange_worker import PATIENT, TRANSFER, Worker, room, running
from tests.exchange.scripted_peer import BOUND_S, Script, dialled, hello, scripted_owner
from tests.memory_transport import Switchboard
from tests.waiting import until


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00\x00\x00\x05hello",
        b"\x00\x00\x00\x00",
        (MAX_HELLO_BYTES + 1).to_bytes(4, "big"),
        b"\xff" * 100,
        encode(Confirm(TRANSFER)),  # a good message where a Hello belongs
    ],
    ids=["http", "no msgpack", "empty frame", "oversized frame", "noise", "not a hello"],
)
async def test_garbage_at_the_port_closes_that_connection_with_one_line_and_others_go_on(
    garbage: bytes, caplog: pytest.LogCaptureFixture
):
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)
    async with running(owner, reader):
        async with dialled(owner) as script:
            script.writer.write(garbage)
            await script.read_until_closed()
        assert await reader.exchange.connect(owner.exchange.address) == "prefill-0"
    lines = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert len(lines) == 1, lines


async def test_a_stranger_that_drips_bytes_is_cut_off_after_the_handshakes_deadline():
    owner = Worker("prefill-0", Switchboard(), timeouts=replace(PATIENT, connect_s=0.8))
    async with running(owner), dialled(owner) as script:
        frame = encode(hello())
        closed = asyncio.ensure_future(script.read_until_closed())
        for byte in frame:
            if closed.done():
                break
            script.writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert closed.done()
        assert not owner.exchange.is_connected("script-0")


async def test_a_peer_of_another_protocol_version_is_told_both_versions():
    owner = Worker("prefill-0", Switchboard())
    async with running(owner), dialled(owner) as script:
        script.stream.send(hello(version=7))
        await script.expect(Hello)
        reject = await script.expect(Reject)
        assert reject.reason == "script-0 speaks block protocol 7, prefill-0 speaks 2"


async def test_a_reader_that_sends_what_only_owners_send_is_cut_off_and_its_leases_end():
    owner = Worker("prefill-0", Switchboard())
    async with running(owner), dialled(owner) as script:
        await script.introduce_as_reader()
        lease = owner.exchange.open_lease(TRANSFER, "script-0", 1)
        await script.expect(Offer)
        script.stream.send(Offer(TRANSFER, 1))
        assert await lease.closed is LeaseOutcome.PEER_LOST


async def test_a_frozen_readers_leases_end_in_time():
    # That the lease is over long before the peer is given up shows on a machine that stands still for a while, too.
    owner = Worker("prefill-0", Switchboard(), timeouts=replace(PATIENT, lease_ttl_s=0.5, peer_timeout_s=3.0))
    async with running(owner), dialled(owner) as script:
        await script.introduce_as_reader()
        lease = owner.exchange.open_lease(TRANSFER, "script-0", 1)
        assert await asyncio.wait_for(lease.closed, BOUND_S) is LeaseOutcome.EXPIRED  # silent from here on
        await asyncio.wait_for(script.read_until_closed(), BOUND_S)
        assert not owner.exchange.is_connected("script-0")


async def test_a_lease_that_heartbeats_do_not_name_expires_and_its_confirmation_is_refused():
    owner = Worker("prefill-0", Switchboard(), timeouts=replace(PATIENT, lease_ttl_s=1.0))
    async with running(owner), dialled(owner) as script:
        await script.introduce_as_reader()
        forgotten = owner.exchange.open_lease(TRANSFER, "script-0", 1)
        renewed = owner.exchange.open_lease(b"renewed", "script-0", 1)
        for lease in (forgotten, renewed):
            lease.announce(0, owner.announced([3], [None]), last=True)
        while not forgotten.closed.done():
            script.stream.send(Heartbeat([b"renewed"]))
            await asyncio.sleep(0.05)
        assert await forgotten.closed is LeaseOutcome.EXPIRED
        for expected in (Offer, Offer, Announce, Announce, Revoke):
            await script.expect(expected)
        script.stream.send(Confirm(TRANSFER))
        assert await script.expect(Confirmed) == Confirmed(TRANSFER, held=False)
        script.stream.send(Confirm(b"renewed"))
        assert await script.expect(Confirmed) == Confirmed(b"renewed", held=True)
        assert await renewed.closed is LeaseOutcome.CONFIRMED


# As many turns of the loop go by until a frame so large is read: what comes after it is late, and our timers are not.
LONG = 50_000


async def test_a_stall_of_our_own_loop_ends_no_lease_that_its_reader_renewed_meanwhile():
    owner = Worker("prefill-0", Switchboard(), timeouts=replace(PATIENT, heartbeat_s=0.4, lease_ttl_s=0.5))
    async with running(owner), dialled(owner) as script:
        await script.introduce_as_reader()
        lease = owner.exchange.open_lease(TRANSFER, "script-0", 1)
        lease.announce(0, owner.announced([3], [None]), last=True)
        script.stream.send(Want(b"another", [bytes(16)] * LONG))
        script.stream.send(Heartbeat([TRANSFER]))
        time.sleep(1.0)  # noqa: ASYNC251 -- the stall: the heartbeat waits in the socket, and the lease's end passes
        script.stream.send(Confirm(TRANSFER))  # right behind it: nothing more comes to renew the lease
        assert await lease.closed is LeaseOutcome.CONFIRMED


async def test_a_stall_of_our_own_loop_ends_no_fetch_whose_owner_was_in_time():
    switchboard = Switchboard()
    pool = Worker("script-0", switchboard)
    reader = Worker("decode-0", switchboard, timeouts=replace(PATIENT, heartbeat_s=0.4, offer_s=0.5))
    scripts: list[Script] = []

    async def play(script: Script) -> None:
        await script.introduce_as_owner(pool)
        scripts.append(script)

    async with running(reader), scripted_owner(play) as address:
        await reader.exchange.connect(address)
        fetch = reader.exchange.fetch(TRANSFER, "script-0", [None], room([5]))
        scripts[0].stream.send(Announce(b"another", 0, [AnnouncedBlock(1, None, 1)] * LONG, last=True))
        scripts[0].stream.send(Offer(TRANSFER, 1))
        time.sleep(1.0)  # noqa: ASYNC251
        await asyncio.sleep(0.3)
        assert fetch.machine.may_succeed
        fetch.abort("seen enough")


async def test_a_reader_names_its_lane_to_owners_that_know_of_that():
    switchboard = Switchboard()
    pool = Worker("script-0", switchboard)
    choices = []

    for features in ((), ("choose.lane",)):

        async def play(script: Script, features=features) -> None:
            choices.append(await script.introduce_as_owner(pool, features))

        reader = Worker("decode-0", switchboard)
        async with running(reader), scripted_owner(play) as address:
            await reader.exchange.connect(address)
    assert [(choice.transport, choice.lane) for choice in choices] == [("memory", ""), ("memory", "memory")]


async def test_wants_without_end_are_refused_beyond_a_bound():
    num_asked, may_lend = 0, asyncio.Event()

    class Slow:
        async def lend_prefix(self, hashes):
            nonlocal num_asked
            num_asked += 1
            await may_lend.wait()
            return []

    owner = Worker("prefill-0", Switchboard(), lender=Slow())
    async with running(owner), dialled(owner) as script:
        await script.introduce_as_reader()
        for number in range(300):
            script.stream.send(Want(number.to_bytes(2, "big"), [bytes(16)]))
        refused = [await script.expect(Revoke) for _ in range(44)]
        assert [revoke.transfer_id for revoke in refused] == [n.to_bytes(2, "big") for n in range(256, 300)]
        assert num_asked == 256
        may_lend.set()
        for _ in range(256):
            await script.expect(Revoke)
        script.stream.send(Want(b"again", [bytes(16)]))
        assert (await script.expect(Revoke)).reason == "none of these blocks is here"


async def test_a_lender_that_breaks_says_so_at_once():
    class Broken:
        async def lend_prefix(self, hashes):
            raise RuntimeError("of all things")

    owner = Worker("prefill-0", Switchboard(), lender=Broken())
    async with running(owner), dialled(owner) as script:
        await script.introduce_as_reader()
        script.stream.send(Want(TRANSFER, [bytes(16)]))
        assert await script.expect(Revoke) == Revoke(TRANSFER, "nothing can be lent")


async def test_owners_that_come_and_go_leave_nothing_behind():
    switchboard = Switchboard()
    reader = Worker("decode-0", switchboard)
    async with running(reader):
        for number in range(5):
            owner = Worker(f"prefill-{number}", switchboard)
            async with running(owner):
                await reader.exchange.connect(owner.exchange.address)
            while reader.exchange._peers.owners:  # noqa: ASYNC110 -- a connection that ends sets no event
                await asyncio.sleep(0.01)
        assert reader.exchange._peers._owner_at == {}


async def test_a_peer_that_does_not_prove_itself_is_waited_for_as_one_that_fell_silent():
    async def silent(script: Script) -> None: ...

    reader = Worker("decode-0", Switchboard(), timeouts=replace(PATIENT, peer_timeout_s=0.3, connect_s=600.0))
    async with scripted_owner(silent) as address, running(reader), asyncio.timeout(BOUND_S):
        with pytest.raises(PeerUnreachable, match=r"handshake failed: not done within 0\.3 s"):
            await reader.exchange.connect(address)


async def test_closing_cancels_nobody_who_waits_for_a_connection():
    async def silent(script: Script) -> None: ...

    reader = Worker("decode-0", Switchboard())
    async with scripted_owner(silent) as address:
        async with running(reader):
            connecting = asyncio.create_task(reader.exchange.connect(address))
            await asyncio.sleep(0.1)
        with pytest.raises(PeerUnreachable, match="we are closing"):
            await connecting


async def test_a_reader_that_connects_anew_replaces_its_old_connection():
    owner = Worker("prefill-0", Switchboard())
    async with running(owner), dialled(owner) as old, dialled(owner) as new:
        await old.introduce_as_reader()
        lease = owner.exchange.open_lease(TRANSFER, "script-0", 1)
        await new.introduce_as_reader()
        assert await lease.closed is LeaseOutcome.PEER_LOST
        await old.read_until_closed()
        owner.exchange.open_lease(b"second", "script-0", 1)
        await new.expect(Offer)


async def test_an_owner_that_freezes_is_noticed_and_the_fetch_fails():
    switchboard = Switchboard()
    reader = Worker("decode-0", switchboard, timeouts=replace(PATIENT, peer_timeout_s=0.8))
    ghost = Worker("ghost", switchboard)

    ordered = asyncio.Event()

    async def play(script: Script) -> None:
        await script.introduce_as_owner(ghost)
        await ordered.wait()
        script.stream.send(Offer(TRANSFER, 1))

    async with running(reader), scripted_owner(play) as address:
        assert await reader.exchange.connect(address) == "script-0"
        fetch = reader.exchange.fetch(TRANSFER, "script-0", [None], room([4]))
        ordered.set()
        failure = (await asyncio.wait_for(fetch.result, BOUND_S)).failure
        assert failure.cause is FetchCause.PEER_LOST
        assert "silent for" in failure.detail
        assert await fetch.quiesced == [4]


async def test_an_owner_that_announces_other_content_than_it_has_is_found_out_by_the_digest():
    switchboard = Switchboard()
    reader, ghost = Worker("decode-0", switchboard), Worker("ghost", switchboard)

    ordered = asyncio.Event()

    async def play(script: Script) -> None:
        await script.introduce_as_owner(ghost)
        await ordered.wait()
        script.stream.send(Offer(TRANSFER, 1))
        script.stream.send(Announce(TRANSFER, 0, [AnnouncedBlock(0, None, 1)], True))

    async with running(reader), scripted_owner(play) as address:
        await reader.exchange.connect(address)
        fetch = reader.exchange.fetch(TRANSFER, "script-0", [None], room([4]))
        ordered.set()
        assert (await asyncio.wait_for(fetch.result, BOUND_S)).failure.cause is FetchCause.DIGEST_MISMATCH


async def test_a_port_that_says_nothing_is_unreachable_after_the_deadline():
    async def play(script: Script) -> None:
        pass

    timeouts = replace(PATIENT, connect_s=0.8)
    reader = Worker("decode-0", Switchboard(), timeouts=timeouts)
    async with running(reader), scripted_owner(play) as address:
        with pytest.raises(PeerUnreachable, match=f"{address}: handshake failed: not done within 0.8 s"):
            await asyncio.wait_for(reader.exchange.connect(address), BOUND_S)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-port", "127.0.0.1:http"])
async def test_an_address_where_nobody_listens_is_unreachable(address: str):
    reader = Worker("decode-0", Switchboard())
    async with running(reader):
        with pytest.raises(PeerUnreachable, match=address):
            await reader.exchange.connect(address)


async def test_many_strangers_are_turned_away_without_touching_established_peers_or_keeping_new_ones_out():
    switchboard = Switchboard()
    owner, reader, late = (Worker(name, switchboard) for name in ("prefill-0", "decode-0", "decode-1"))
    async with running(owner, reader, late):
        await reader.exchange.connect(owner.exchange.address)
        host, _, port = owner.exchange.address.rpartition(":")
        strangers = [await asyncio.open_connection(host, int(port)) for _ in range(80)]
        await strangers[0][0].read()  # closed at once: one too many
        assert owner.exchange.is_connected("decode-0")
        assert await late.exchange.connect(owner.exchange.address) == "prefill-0"
        for _, writer in strangers:
            writer.transport.abort()
        lease = owner.exchange.open_lease(TRANSFER, "decode-0", 1)
        assert await lease.closed is LeaseOutcome.RELEASED


async def test_a_stranger_that_is_turned_away_with_its_proof_read_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)

    async def turned_away(stream, side):
        def on_proven_late(peer) -> None:
            owner.exchange._peers._strangers.clear()
            side.on_proven(peer)

        return await introduce_as_owner(stream, replace(side, on_proven=on_proven_late))

    monkeypatch.setattr("kvstore.exchange.peer_sessions.introduce_as_owner", turned_away)
    async with running(owner, reader):
        with pytest.raises(PeerUnreachable):
            await reader.exchange.connect(owner.exchange.address)
        await until(lambda: "turned away" in caplog.text)
        assert not owner.exchange._peers._newcomers
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_stranger_in_the_middle_of_its_handshake_is_no_error_when_we_close():
    worker, errors = Worker("prefill-0", Switchboard()), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    async with running(worker):
        _, writer = await asyncio.open_connection(*worker.exchange.address.split(":"))
        await until(lambda: worker.exchange._peers._strangers)
    writer.close()
    assert errors == []


async def test_a_connection_that_ends_before_it_runs_leaves_no_coroutine_unawaited(monkeypatch: pytest.MonkeyPatch):
    install = PeerSessions._install

    def install_and_close(sessions: PeerSessions, connections: dict, connection: Connection) -> None:
        install(sessions, connections, connection)
        connection.close("replaced in this very moment")

    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)
    monkeypatch.setattr(PeerSessions, "_install", install_and_close)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        await until(lambda: not reader.exchange._peers.undrained)
    gc.collect()  # what was never awaited says so now, and a warning is an error
