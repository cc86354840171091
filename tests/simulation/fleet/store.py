"""One simulated store node: the product's node, tiers and intake, over files whose disk may be full, stuck, failing."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.block import BlockHash, HostMemory, ProofKey, subject_of
from kvstore.errors import KVStoreError
from kvstore.exchange import Outside, PeerIdentity
from kvstore.protocol import AnnouncedBlock, ExchangeTimeouts
from kvstore.registry import Registrar, WorkerRecord
from kvstore.store import DiskTier, StoreNode, TieredStore
from kvstore.store.disk_files import FileCalls
from kvstore.store.node import StoreLender
from services.store.index_feed import StoreIndexFeed
from services.store.metrics import StoreMetrics
from tests.simulation.fleet.redis_host import LEASE_S, REDIS_URL
from tests.simulation.fleet.worker import BLOCK_SIZE, MODEL, PEER_KEYS, SimWorker
from tests.simulation.pool import Invariant
from tests.simulation.threads import SimThreads

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

DISK_POOL: Final = "disk-tier"
_FORGERS_KEY: Final = ProofKey(b"what a forger makes up by himself")
_KV_PORT: Final = 7000
_NUM_SLOTS: Final = 16
_NUM_DISK_BLOCKS: Final = 40
_FLUSH_S: Final = 5.0


class SimDisk:
    """The calls that may fail. `is_full`: no space; `is_failing`: some reads fail, or bring a flipped bit."""

    def __init__(self, world: FleetWorld, draw: random.Random) -> None:
        self.is_full = False
        self.is_failing = False
        self._world = world
        self._draw = draw
        self.calls = FileCalls(self._write, self._read, self._allocate, lambda fd: None)

    def _write(self, fd: int, parts: Sequence[memoryview], offset: int) -> int:
        self._check_space()
        return os.pwritev(fd, parts, offset)

    def _allocate(self, fd: int, offset: int, num_bytes: int) -> None:
        self._check_space()
        os.ftruncate(fd, max(os.fstat(fd).st_size, offset + num_bytes))

    def _read(self, fd: int, parts: Sequence[memoryview], offset: int) -> int:
        num_read = os.preadv(fd, parts, offset)
        if self.is_failing and self._draw.random() < 0.3:
            self._world.reach("disk read failed")
            if num_read == 0 or self._draw.random() < 0.5:
                raise OSError(errno.EIO, "the disk has lost it")
            parts[0].cast("B")[self._draw.randrange(num_read)] ^= 1 << self._draw.randrange(8)
        return num_read

    def _check_space(self) -> None:
        if self.is_full:
            self._world.reach("disk refused")
            raise OSError(errno.ENOSPC, "no space left")


class Forger:
    """Lends other bytes than it was given, with proofs that it makes up: it has the peers' key, not the workers'."""

    def __init__(self, world: FleetWorld, lender: StoreLender, memory: HostMemory) -> None:
        self._world = world
        self._lender = lender
        self._memory = memory

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        lent = await self._lender.lend_prefix(hashes)
        for block in lent:
            self._memory.view(block.block_id)[:] = 0
        if lent:
            self._world.reach("forged")
        subjects = [subject_of(BlockHash(block.block_hash)) for block in lent if block.block_hash is not None]
        proofs = _FORGERS_KEY.prove(self._memory, [block.block_id for block in lent], subjects)
        return [AnnouncedBlock(each.block_id, each.block_hash, proof) for each, proof in zip(lent, proofs, strict=True)]

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        await self._lender.take_back(blocks)

    async def recheck(self, hashes: Sequence[BlockHash]) -> None: ...


class SimStore:
    """One start of a store node. It comes back with what its directory has."""

    role: Final = "store"

    def __init__(self, world: FleetWorld, name: str, incarnation: str, worker: SimWorker, directory: Path) -> None:
        self.name, self.incarnation = name, incarnation
        self.is_leaving = False
        self.num_filled = 0
        self._world = world
        self.process = world.loop.new_process(f"{name}/{incarnation}")
        self.disk = SimDisk(world, world.plan.stream(f"disk {name}/{incarnation}"))
        layout = worker.engine.layout
        with world.loop.within(self.process):
            self.threads = SimThreads(world.loop)
            memory = HostMemory.allocate(_NUM_SLOTS, layout.block_bytes)
            self.transport = world.make_transport(memory, self.process.name)
            max_bytes = _NUM_DISK_BLOCKS * (layout.block_bytes + 128) + 4096
            self._tier = DiskTier.open(directory, layout, max_bytes, calls=self.disk.calls, clock=self.clock)
            world.reach("blocks found on disk" if len(self._tier) else "empty disk")
            self._feed = StoreIndexFeed(REDIS_URL, name, incarnation, LEASE_S, StoreMetrics().index)
            store = TieredStore(memory, self._tier, on_change=self._feed.changed, threads=self.threads)
            self._feed.watch(store)
            self.node = StoreNode(
                PeerIdentity(f"{name}/{incarnation}", "store", incarnation, layout),
                store,
                [self.transport],
                outside=Outside(world.net.of(name, self.process), self.clock, world.new_id, self.threads),
                keys=PEER_KEYS,
                timeouts=ExchangeTimeouts(peer_timeout_s=4.0, offer_s=4.0),
            )
            self.record = self._record()
            self._registrar = Registrar(REDIS_URL, self.record, LEASE_S)

    def forge(self) -> None:
        """Lend forged blocks from now on."""
        self.node.exchange._lender = Forger(self._world, self.node.lender, self.node.store.memory)

    def stop_forging(self) -> None:
        self.node.exchange._lender = self.node.lender

    def clock(self) -> float:
        return self._world.loop.time() + self.process.clock_ahead_s

    async def start(self) -> None:
        await self.node.start(self.name, _KV_PORT)
        await self._feed.start()
        await self._registrar.start()

    async def leave(self, drain_s: float) -> None:
        await self.close()

    async def close(self) -> None:
        await self._registrar.close()
        await self._feed.close()
        await self.node.close(_FLUSH_S)
        self.check_at_rest()

    def vanish(self) -> None:
        """The process is gone: its files are closed, as they are."""
        if not self._tier._is_closed:
            self._tier._is_closed = True
            self._tier._files.close()
            self._tier._directory.close()

    def rot(self, draw: random.Random) -> None:
        """A bit of each block changes where it lies."""
        dram = self.node.store.dram
        for block in map(dram.find, sorted(dram.hashes())):
            if block is not None:
                view = self.node.store.memory.view(block.slot)
                view[draw.randrange(len(view))] ^= 1 << draw.randrange(8)
                self._world.reach("rotten in a store")

    def check_at_rest(self) -> None:
        self._world.judge(Invariant.NO_LEAK)
        dram = self.node.store.dram
        left = {"private": dram.num_private, "lent": self.node.lender.num_lent}
        if any(left.values()):
            self._world.report(Invariant.NO_LEAK, f"{self.process.name} at rest: {left}")
        try:
            self.node.check_integrity()
        except KVStoreError as error:
            self._world.report(Invariant.ONE_OWNER, f"{self.process.name}: {error}")

    def _record(self) -> WorkerRecord:
        layout = self.node.identity.layout
        return WorkerRecord(
            worker_id=self.name,
            role="store",
            incarnation=self.incarnation,
            served_model_names=(MODEL,),
            model_path=MODEL,
            tokenizer_path=MODEL,
            model_fingerprint=layout.model_fingerprint,
            grpc_address="",
            kv_address=f"{self.name}:{_KV_PORT}",
            http_address="",
            block_size=BLOCK_SIZE,
            num_blocks=_NUM_SLOTS,
            max_model_len=0,
            max_num_seqs=0,
            dtype=layout.dtype,
            transports=("memory",),
            layout=layout.to_wire(),
        )
