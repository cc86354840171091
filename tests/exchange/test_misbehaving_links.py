"""Links that raise where they should return a future, and readers that ask for what their link cannot do."""

import asyncio

from kvstore.protocol import FetchCause, LeaseOutcome
from kvstore.protocol.messages import ReadRequest
from tests.exchange.exchange_worker import TRANSFER, Worker, room, running, some_hashes
from tests.memory_transport import Switchboard

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

        def burst(read_id, runs):
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
