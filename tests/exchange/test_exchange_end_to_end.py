"""The whole block protocol over real TCP connections, with blocks moving through the in-memory transport."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from kvstore.block_hash import BlockHash
from kvstore.exchange import BlockExchange
from kvstore.fetch_events import ReadLimits, Reservation
from kvstore.handshake import PeerIdentity
from kvstore.layout import BlockLayout
from kvstore.lease import LeaseOutcome
from kvstore.memory import HostMemory
from kvstore.messages import AnnouncedBlock
from kvstore.timeouts import ExchangeTimeouts
from kvstore.transport.memory import Faults, MemoryTransport, Switchboard

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, block_size=8, head_dim=4, dtype="float32", model_fingerprint="ab12")
QUICK = ExchangeTimeouts(heartbeat_s=0.05, peer_timeout_s=0.6, lease_ttl_s=0.5, drain_s=0.3, close_s=0.5, read_s=1.0)
TRANSFER = b"0123456789abcdef"


class Worker:
    """A worker of the test: a pool with random contents and an exchange over it."""

    def __init__(
        self,
        name: str,
        switchboard: Switchboard,
        layout: BlockLayout = LAYOUT,
        faults: Faults | None = None,
        timeouts: ExchangeTimeouts = QUICK,
        num_blocks: int = 64,
    ) -> None:
        self.memory = HostMemory.allocate(num_blocks, layout.block_bytes)
        self.memory.array[:] = np.random.default_rng(len(name)).integers(0, 256, self.memory.array.shape, np.uint8)
        self.transport = MemoryTransport(self.memory, switchboard, faults, seed=1)
        identity = PeerIdentity(name, "prefill", f"{name}-1", layout)
        self.exchange = BlockExchange(
            identity, self.memory, [self.transport], timeouts, limits=ReadLimits(max_reads=2, max_blocks=4)
        )

    def announced(self, block_ids: list[int], hashes: list[BlockHash | None]) -> list[AnnouncedBlock]:
        digests = self.memory.digests(block_ids)
        return [AnnouncedBlock(*block) for block in zip(block_ids, hashes, digests, strict=True)]


@asynccontextmanager
async def running(*workers: Worker) -> AsyncIterator[None]:
    for worker in workers:
        await worker.exchange.start("127.0.0.1", 0)
    try:
        yield
    finally:
        for worker in workers:
            await worker.exchange.close()


def some_hashes(num_blocks: int) -> list[BlockHash | None]:
    return [*(BlockHash(bytes([i]) * 16) for i in range(num_blocks - 1)), None]


def room(block_ids: list[int], num_present: int = 0):
    async def reserve() -> Reservation:
        return Reservation(block_ids, num_present)

    return reserve


async def test_blocks_announced_in_chunks_arrive_and_the_lease_is_confirmed():
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)
    source, target, hashes = [9, 10, 11, 3, 40, 41, 7, 8, 63, 0], [5, 6, 7, 20, 30, 31, 1, 2, 3, 4], some_hashes(10)
    async with running(owner, reader):
        assert await reader.exchange.connect(owner.exchange.address) == "prefill-0"
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", hashes, room(target, num_present=1))
        lease = owner.exchange.open_lease(TRANSFER, "decode-0", 10)
        lease.announce(0, owner.announced(source[:6], hashes[:6]), last=False)
        lease.announce(6, owner.announced(source[6:], hashes[6:]), last=True)
        result = await fetch.result
        assert result.ok, result.failure
        assert (result.block_ids, result.num_blocks) == (target, 9)
        assert await fetch.quiesced == []
        assert await lease.closed is LeaseOutcome.CONFIRMED
        np.testing.assert_array_equal(reader.memory.array[target[1:]], owner.memory.array[source[1:]])
        stamps = result.stamps
        assert stamps.offered <= stamps.reserved <= stamps.first_read <= stamps.last_read <= stamps.verified
        assert stamps.verified <= stamps.confirmed
        assert reader.exchange.state()["fetches"] == []
        assert owner.exchange.state()["leases"] == []
