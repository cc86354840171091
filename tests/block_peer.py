"""A process that speaks the block protocol with a live stack over UCX: the test itself. It may lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tandem.v1 import worker_pb2 as pb

from kvstore.block_hash import BlockHash
from kvstore.exchange import BlockExchange
from kvstore.fetch_events import Reservation
from kvstore.handshake import PeerIdentity
from kvstore.layout import BlockLayout
from kvstore.memory import HostMemory
from kvstore.messages import AnnouncedBlock
from kvstore.registry import new_incarnation
from kvstore.transport.select import make_transports
from kvstore.worker_record import WorkerRecord

_FETCH_S = 60.0


class BlockPeer:
    """Fetches blocks from members of a stack, and lends them under the digests that they came with."""

    def __init__(self, layout: BlockLayout, num_slots: int) -> None:
        self.memory = HostMemory.allocate(num_slots, layout.block_bytes)
        self.incarnation = new_incarnation()
        self.num_lent = 0
        identity = PeerIdentity(f"peer/{self.incarnation}", "store", self.incarnation, layout)
        transports = make_transports("ucxx", self.memory, "peer")
        self.exchange = BlockExchange(identity, self.memory, transports, lender=self)
        self._slots: dict[BlockHash, tuple[int, int]] = {}  # with the digest

    async def fetch(self, holder: WorkerRecord, hashes: Sequence[BlockHash]) -> None:
        """Take these blocks over from a worker or a store node."""
        first = len(self._slots)

        async def reserve(num_blocks: int) -> Reservation:
            return Reservation(list(range(first, first + num_blocks)))

        owner = await self.exchange.connect(holder.kv_address)
        fetch = self.exchange.fetch_prefix(first.to_bytes(16, "big"), owner, hashes, reserve)
        result = await asyncio.wait_for(fetch.result, _FETCH_S)
        assert result.failure is None, result.failure
        assert len(result.block_ids) == len(hashes)
        for block_hash, slot in zip(hashes, result.block_ids, strict=True):
            (digest,) = self.memory.digests([slot])
            self._slots[block_hash] = (slot, digest)

    def bytes_of(self, block_hash: BlockHash) -> bytes:
        return self.memory.view(self._slots[block_hash][0]).tobytes()

    def flip(self, block_hash: BlockHash, offset: int, bit: int = 1) -> None:
        """What is sent from now on is not what is announced."""
        self.memory.view(self._slots[block_hash][0])[offset] ^= bit

    def source(self, num_blocks: int) -> pb.PrefixSource:
        """The hint that we have the first blocks of a prompt."""
        return pb.PrefixSource(
            holder_id="peer",
            incarnation=self.incarnation,
            kv_address=self.exchange.address,
            num_blocks=num_blocks,
            tier="store",
        )

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        self.num_lent += 1
        found: list[AnnouncedBlock] = []
        for block_hash in hashes:
            if block_hash not in self._slots:
                break
            slot, digest = self._slots[block_hash]
            found.append(AnnouncedBlock(slot, block_hash, digest))
        return found

    async def take_back(self, blocks: Sequence[AnnouncedBlock], was_confirmed: bool) -> None:
        """What is lent stays where it is."""


@asynccontextmanager
async def block_peer(record: WorkerRecord, num_slots: int = 128) -> AsyncIterator[BlockPeer]:
    """A peer with the layout of a worker of the stack."""
    peer = BlockPeer(BlockLayout.from_wire(record.layout or {}), num_slots)
    await peer.exchange.start("127.0.0.1", 0)
    try:
        yield peer
    finally:
        await peer.exchange.close()
