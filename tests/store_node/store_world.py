"""A store node and workers that offer it chains, over the in-memory transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from kvstore.block import BlockHash, BlockLayout, HostMemory
from kvstore.exchange import BlockExchange, Outside, PeerIdentity
from kvstore.protocol import AnnouncedBlock, ExchangeTimeouts, FetchResult, Reservation
from kvstore.store import DiskTier, StoreNode, StoreTier, TieredStore
from tests.memory_transport import Faults, MemoryTransport, Switchboard
from tests.peers import PROOFS
from tests.pieces import host_memory, read_block, write_all
from tests.proofs import KEY, prove
from tests.waiting import until

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, block_size=8, head_dim=4, dtype="float32", model_fingerprint="ab12")
# Nothing is late by these on a machine that stands still for a while; what has failed is given back soon.
PATIENT = ExchangeTimeouts(
    heartbeat_s=0.05, peer_timeout_s=20.0, connect_s=20.0, lease_ttl_s=20.0, drain_s=0.3, close_s=0.5, read_s=20.0
)


def chain(name: str, length: int) -> list[BlockHash]:
    """Hashes of a chain of its own."""
    return [BlockHash(f"{name}-{i}".encode().ljust(16, b".")) for i in range(length)]


class Worker:
    """Holds chains in a pool of random bytes, lends them, and says so. Also reads from a node, as a worker would."""

    def __init__(
        self, name: str, switchboard: Switchboard, seed: int = 1, lies: bool = False, num_pieces: int = 1
    ) -> None:
        self.memory = host_memory(num_pieces, 64, LAYOUT.block_bytes)
        write_all(self.memory, np.random.default_rng(seed).integers(0, 256, (64, LAYOUT.block_bytes), np.uint8))
        self.lies = lies
        self.slots: dict[BlockHash, int] = {}
        self.wanted: list[list[BlockHash]] = []
        self.may_lend = asyncio.Event()
        self.may_lend.set()
        identity = PeerIdentity(f"{name}/1", "prefill", "1", LAYOUT)
        transport = MemoryTransport(self.memory, switchboard, None, seed=seed)
        self.exchange = BlockExchange(
            identity, self.memory, [transport], PATIENT, proof_key=KEY, keys=PROOFS.blocks, lender=self
        )
        self._room = iter(range(40, 64))

    def hold(self, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            self.slots.setdefault(block_hash, len(self.slots))

    def bytes_of(self, block_hash: BlockHash) -> bytes:
        return read_block(self.memory, self.slots[block_hash])

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        self.wanted.append(list(hashes))
        await self.may_lend.wait()
        held = hashes[: next((i for i, each in enumerate(hashes) if each not in self.slots), len(hashes))]
        ids = [self.slots[each] for each in held]
        proofs = (proof ^ self.lies for proof in prove(self.memory, ids, held))
        return [AnnouncedBlock(*each) for each in zip(ids, held, proofs, strict=True)]

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None: ...

    async def recheck(self, hashes: Sequence[BlockHash]) -> None: ...

    async def offer(
        self, node: StoreNode, hashes: Sequence[BlockHash], parent: BlockHash | None = None, address: str = ""
    ) -> None:
        peer_id = await self.exchange.connect(node.exchange.address)
        self.exchange.tell_have(peer_id, address or self.exchange.address, parent, hashes)

    async def fetch(self, node: StoreNode, hashes: Sequence[BlockHash]) -> tuple[FetchResult, list[bytes]]:
        """Read a prefix from the node: the result, and the bytes that came."""
        slots = [next(self._room) for _ in hashes]

        async def reserve(num_blocks: int) -> Reservation:
            return Reservation(slots[:num_blocks])

        peer_id = await self.exchange.connect(node.exchange.address)
        result = await self.exchange.fetch_prefix(bytes(slots[:1]) * 16, peer_id, hashes, reserve).result
        return result, [read_block(self.memory, slot) for slot in result.block_ids]


class World:
    """Makes nodes and workers that can reach each other, and closes them."""

    def __init__(self) -> None:
        self.switchboard = Switchboard()
        self.changes: list[tuple[BlockHash, StoreTier, bool]] = []
        self._open: list[Callable[[], object]] = []

    async def node(
        self,
        num_slots: int = 32,
        disk: Path | None = None,
        faults: Faults | None = None,
        incarnation: str = "1",
        timeouts: ExchangeTimeouts = PATIENT,
    ) -> StoreNode:
        memory = HostMemory.allocate(num_slots, LAYOUT.block_bytes)
        tier = DiskTier.open(disk, LAYOUT, 4 << 20) if disk is not None else None
        store = TieredStore(memory, tier, on_change=lambda *change: self.changes.append(change), timeout_s=20.0)
        identity = PeerIdentity(f"store-0/{incarnation}", "store", incarnation, LAYOUT)
        transport = MemoryTransport(memory, self.switchboard, faults, seed=3)
        node = StoreNode(identity, store, [transport], outside=Outside(), keys=PROOFS.blocks, timeouts=timeouts)
        await node.start("127.0.0.1", 0)
        self._open.append(node.close)
        return node

    async def worker(self, name: str = "prefill-0", seed: int = 1, lies: bool = False, num_pieces: int = 1) -> Worker:
        worker = Worker(name, self.switchboard, seed, lies, num_pieces)
        await worker.exchange.start("127.0.0.1", 0)
        self._open.append(worker.exchange.close)
        return worker

    async def close(self) -> None:
        for close in reversed(self._open):
            await close()  # type: ignore[misc]


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    made = World()
    try:
        yield made
    finally:
        await made.close()


async def idle(node: StoreNode, num_offers: int) -> None:
    """Until the node has heard of so many offers, and has dealt with them."""
    await until(lambda: node.intake.stats.num_offers >= num_offers and node.intake.is_idle)
