"""Links that raise where they should return a future, and readers that ask for what their link cannot do."""

import asyncio
from dataclasses import replace

import pytest

from kvstore.errors import PeerUnreachable
from kvstore.protocol import FetchCause, LeaseOutcome
from kvstore.protocol.messages import ReadRequest
from tests.exchange.exchange_worker import PATIENT, TRANSFER, Worker, room, running, some_hashes
from tests.memory_transport import Switchboard
from tests.waiting import until

BLOCKS = [1, 2, 3]


def order(owner: Worker, reader: Worker):
    hashes = some_hashes(len(BLOCKS))
    fetch = reader.exchange.fetch(TRANSFER, "prefill-0", hashes, room(BLOCKS))
    lease = owner.exchange.open_lease(TRANSFER, "decode-0", len(BLOCKS))
    return fetch, lease, hashes


async def test_a_read_that_raises_at_once_fails_the_fetch_and_gives_the_blocks_back(monkeypatch):
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease, hashes = order(owner, reader)

        def burst(read_id, runs, landed):
            raise OverflowError("Python int too large to convert to C long")

        monkeypatch.setattr(reader.exchange._peers.owners["prefill-0"].link, "read", burst)
        lease.announce(0, owner.announced(BLOCKS, hashes), last=True)
        result = await fetch.result
        assert result.failure.cause is FetchCause.READ_FAILED
        assert await asyncio.wait_for(fetch.quiesced, 60) == BLOCKS
        assert await fetch.leftovers() == BLOCKS
        assert await asyncio.wait_for(lease.closed, 60) is not LeaseOutcome.CONFIRMED


async def test_a_read_request_over_a_one_sided_link_ends_the_connection_and_the_lease():
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease, _ = order(owner, reader)
        reader.exchange._peers.owners["prefill-0"].send(ReadRequest(1, TRANSFER, []))
        assert await asyncio.wait_for(lease.closed, 60) is LeaseOutcome.PEER_LOST
        assert (await fetch.result).failure.cause is FetchCause.PEER_LOST
        assert not owner.exchange.is_connected("decode-0")


async def test_a_fetch_aborted_just_after_it_succeeded_leaves_its_blocks_to_the_caller():
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease, hashes = order(owner, reader)
        lease.announce(0, owner.announced(BLOCKS, hashes), last=True)
        assert (await fetch.result).ok
        fetch.abort("too late")
        assert await fetch.quiesced == []
        assert await fetch.leftovers() == BLOCKS


@pytest.mark.parametrize("whose", ["reader", "owner"])
async def test_a_link_in_the_making_is_left_as_soon_as_either_sides_transport_stands_still(whose, monkeypatch):
    """And not when the time for all handshakes is up: a client waits for it."""
    switchboard, timeouts = Switchboard(), replace(PATIENT, connect_s=3600.0, peer_timeout_s=3600.0)
    owner, reader = (Worker(name, switchboard, timeouts=timeouts) for name in ("prefill-0", "decode-0"))
    hanging = asyncio.Event()

    async def hang(peer):
        hanging.set()
        await asyncio.Event().wait()

    async with running(owner, reader):
        monkeypatch.setattr(reader.transport, "connect", hang)  # as it does where the owner's end gives no answer, too
        dialling = asyncio.ensure_future(reader.exchange.connect(owner.exchange.address))
        await hanging.wait()
        if whose == "owner":
            await until(lambda: owner.exchange._peers._linking)
        (owner if whose == "owner" else reader).exchange.note_still(["memory"])
        with pytest.raises(PeerUnreachable):
            await asyncio.wait_for(dialling, 60)
        await until(lambda: not owner.exchange._peers._linking and not reader.exchange._peers._linking)
        monkeypatch.undo()
        for each in (owner, reader):
            each.exchange.note_still([])
        assert await reader.exchange.connect(owner.exchange.address) == "prefill-0"
