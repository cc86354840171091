"""One simulated worker: a real `BlockExchange`, and around it the least that a decode, prefill and store process do.

reader  connect -> fetch (a prefix by hash, or an order's handoff) -> use -> publish -> give back
owner   lend a prefix: pin -> lease -> unpin; serve an order: compute chunk by chunk, announce -> lease closes
store   hears `have`, fetches what is offered from where it is, and lends it on
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvstore.block import BlockHash, Subject, subject_of
from kvstore.errors import IncompatiblePeer, KVStoreError, OutOfBlocks, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange, Fetch, Lease, Outside, PeerIdentity
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import AnnouncedBlock, FetchResult, Have, LeaseOutcome, Reservation
from tests.proofs import KEY
from tests.simulation.pool import LAYOUT, Invariant, WatchedPool
from tests.simulation.threads import SimThreads

if TYPE_CHECKING:
    from tests.simulation.world import World

PORT: Final = 7000
_KEYS: Final = PeerKeys((b"the key of the simulated deployment",))


@dataclass
class Habits:
    """How often a node's users do what makes trouble: probabilities, and seconds at most."""

    abort: float = 0.0
    revoke: float = 0.0
    compute_s: float = 0.2
    patience_s: float = 3.0
    """How long a reservation waits for room."""


@dataclass
class Order:
    """What a reader asks of a prefill worker: blocks of a chain, and a partial last one without a hash."""

    transfer_id: bytes
    reader: str
    hashes: list[BlockHash]
    has_partial: bool

    @property
    def num_blocks(self) -> int:
        return len(self.hashes) + self.has_partial

    def name(self, index: int) -> bytes:
        return self.hashes[index] if index < len(self.hashes) else self.transfer_id

    def subject(self, index: int) -> Subject:
        return subject_of(self.hashes[index] if index < len(self.hashes) else None, self.transfer_id, index)


@dataclass
class Node:
    """One start of a worker."""

    world: World
    name: str
    incarnation: str
    habits: Habits = field(default_factory=Habits)

    def __post_init__(self) -> None:
        world = self.world
        self.process = world.loop.new_process(f"{self.name}/{self.incarnation}")
        self.random = world.plan.stream(f"node {self.process.name}")
        self.pool = WatchedPool(self.process.name, world.size.num_blocks, self._num_leased, world.report, world.judge)
        self.live_fetches: list[Fetch] = []
        self.is_leaving = False
        self.num_busy = 0  # users of ours that hold something, or wait
        self.threads = SimThreads(world.loop)
        self.transport = world.make_transport(self.pool.memory, self.random.getrandbits(32))
        self.exchange = BlockExchange(
            PeerIdentity(self.process.name, "store", self.incarnation, LAYOUT),
            self.pool.memory,
            [self.transport],
            world.timeouts,
            proof_key=KEY,
            outside=Outside(world.net.of(self.name, self.process), self.clock, world.new_id, self.threads),
            keys=_KEYS,
            lender=self,
            on_have=self._on_have,
        )

    def clock(self) -> float:
        return self.world.loop.time() + self.process.clock_ahead_s

    async def start(self) -> None:
        await self.exchange.start(self.name, PORT)
        for number in range(self.world.size.num_clients):
            self.spawn(functools.partial(self._be_client, f"{self.process.name}.{number}"))

    def spawn(self, work: Callable[[], object]) -> None:
        """Run one of our users; the world hears of its errors."""
        self.num_busy += 1

        async def run() -> None:
            try:
                await work()
            except Exception as error:
                self.world.report(Invariant.NO_INTERNAL_ERROR, f"{self.process.name}: {error!r}")
            finally:
                self.num_busy -= 1

        self.world.keep(asyncio.get_running_loop().create_task(run(), name=getattr(work, "__name__", "work")))

    def _num_leased(self, block_id: int) -> int:
        leases = (
            handle.machine
            for connection in self.exchange._peers.undrained
            for handle in connection.handles.values()
            if isinstance(handle, Lease)
        )
        return sum(1 for lease in leases if any(block.block_id == block_id for block in lease.blocks))

    # ---- the reader ----

    async def _be_client(self, name: str) -> None:
        for number in itertools.count():
            if self.world.is_ending or self.is_leaving:
                return
            operation = f"{name}.{number}"
            draw = self.world.plan.stream(operation)
            await asyncio.sleep(draw.uniform(0, 1.0))
            peers = [each for each in self.world.names if each != self.name]
            owner, hashes = draw.choice(peers), self.world.draw_hashes(draw)
            if not self.world.does(operation):
                continue
            if draw.random() < 0.5:
                await self.fetch_prefix(owner, hashes)
            else:
                await self.order(owner, hashes)

    async def fetch_prefix(self, owner: str, hashes: Sequence[BlockHash]) -> bool:
        """Fetch what an owner has of a chain; whether anything came."""
        transfer_id = self.world.new_id()
        peer_id = await self._connect(owner)
        if peer_id is None:
            return False
        reserve = functools.partial(self._find_room, [])
        incarnation = self.world.record_of(self.name, owner)
        try:
            fetch = self.exchange.fetch_prefix(transfer_id, peer_id, hashes, reserve, incarnation)
        except PeerLost:
            return False
        return await self._take_over(fetch, Order(transfer_id, self.process.name, list(hashes), False), incarnation)

    async def order(self, owner: str, hashes: Sequence[BlockHash]) -> bool:
        """Have an owner compute a prompt, and take its blocks over."""
        order = Order(self.world.new_id(), self.process.name, list(hashes), self.random.random() < 0.5)
        peer_id = await self._connect(owner)
        if peer_id is None:
            return False
        expected: list[BlockHash | None] = [*hashes, None] if order.has_partial else list(hashes)
        incarnation = self.world.record_of(self.name, owner)
        try:
            fetch = self.exchange.fetch(
                order.transfer_id, peer_id, expected, functools.partial(self._find_room, hashes), incarnation
            )
        except PeerLost:
            return False
        self.world.carry_order(self.name, owner, order)
        return await self._take_over(fetch, order, incarnation)

    async def _connect(self, owner: str) -> str | None:
        try:
            return await self.exchange.connect(f"{owner}:{PORT}")
        except (PeerUnreachable, IncompatiblePeer):
            return None

    async def _find_room(self, present: Sequence[BlockHash], num_blocks: int) -> Reservation:
        """Wait for room for so many blocks; those of `present` that are here count. Raises `OutOfBlocks`."""
        give_up_at = self.world.loop.time() + self.habits.patience_s
        while True:
            held = self.pool.book.match_prefix(present[:num_blocks])
            try:
                return Reservation(held + self.pool.take(num_blocks - len(held)), len(held))
            except OutOfBlocks:
                self.pool.give_back(held)
                self.world.reach("no room")
                if self.world.loop.time() >= give_up_at:
                    raise
            await asyncio.sleep(self.random.uniform(0.1, 0.5))

    async def _take_over(self, fetch: Fetch, order: Order, incarnation: str) -> bool:
        """See a fetch to its end, and use what came of it."""
        if self.random.random() < self.habits.abort:
            self.world.faults["aborts"] += 1
            when_s = self.random.uniform(0, 2.0)
            asyncio.get_running_loop().call_later(when_s, self.abort, fetch, "the client left")
            if self.random.random() < 0.5:
                await asyncio.sleep(when_s)
                self.pool.give_back(await fetch.leftovers())
                return False
        self.live_fetches.append(fetch)
        result = await fetch.result
        self.live_fetches.remove(fetch)
        self.world.reach("fetched" if result.failure is None else f"failed: {result.failure.cause.value}")
        if result.failure is not None:
            if fetch.machine.quarantined:
                self.world.reach("quarantine")
            self.pool.give_back(await fetch.quiesced)
            return False
        self.world.check_taken(fetch.transfer_id, incarnation)
        await self._use(order, result)
        return True

    def abort(self, fetch: Fetch, reason: str) -> None:
        """End a fetch of ours, and see that it has ended."""
        if fetch.machine.may_succeed:
            self.world.judge(Invariant.ABORTS_END)
        fetch.abort(reason)
        if fetch.machine.may_succeed:
            state = fetch.machine.state.name
            self.world.report(Invariant.ABORTS_END, f"{self.process.name}: {fetch.transfer_id.hex()} is {state}")

    async def _use(self, order: Order, result: FetchResult) -> None:
        parent: BlockHash | None = None
        for index, (block_id, proof) in enumerate(zip(result.block_ids, result.proofs, strict=True)):
            if index < len(order.hashes):
                self.pool.publish(block_id, order.hashes[index], parent, proof)
                parent = order.hashes[index]
            else:
                self.pool.use(block_id, order.name(index))
        self.tell_store(order.hashes[: len(result.block_ids)])
        await asyncio.sleep(self.random.uniform(0, 1.0))
        for block_id in result.block_ids:
            self.pool.check_bytes(block_id)
        self.pool.give_back(result.block_ids)

    def tell_store(self, hashes: Sequence[BlockHash]) -> None:
        """Offer blocks to whom we read from: it takes them in by a fetch of its own."""
        peers = list(self.exchange._peers.owners)
        if hashes and peers and self.random.random() < 0.3:
            try:
                self.exchange.tell_have(self.random.choice(peers), f"{self.name}:{PORT}", None, hashes)
            except PeerLost:
                return

    # ---- the store ----

    def _on_have(self, peer: PeerIdentity, have: Have) -> None:
        if not (self.world.is_ending or self.is_leaving):
            self.world.reach("have")
            owner = have.address.partition(":")[0]
            hashes = [BlockHash(each) for each in have.hashes]
            self.spawn(functools.partial(self.fetch_prefix, owner, hashes))

    # ---- the owner ----

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        await asyncio.sleep(self.threads.draw_s())
        return [AnnouncedBlock(block.slot, block.block_hash, block.proof) for block in self.pool.book.pin(hashes)]

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        self.pool.give_back([block.block_id for block in blocks])

    async def recheck(self, hashes: Sequence[BlockHash]) -> None:
        self.world.reach("suspect")
        pinned = [block for block_hash in hashes for block in self.pool.book.pin([block_hash], is_use=False)]
        ids = [block.slot for block in pinned]
        subjects, proofs = [subject_of(block.block_hash) for block in pinned], [block.proof for block in pinned]
        try:
            wrong = await self.threads.run(functools.partial(KEY.find_wrong, self.pool.memory, ids, subjects, proofs))
            self.pool.book.drop(ids[position] for position in wrong)
        finally:
            self.pool.give_back(ids)

    def hold(self, hashes: Sequence[BlockHash]) -> bool:
        """Compute these blocks and keep them; False without room."""
        try:
            held = self.pool.book.match_prefix(hashes)
            ids = held + self.pool.take(len(hashes) - len(held))
        except OutOfBlocks:
            self.pool.give_back(held)
            return False
        parent: BlockHash | None = None
        for block_id, block_hash in zip(ids, hashes, strict=True):
            if block_id not in held:
                proof = self.pool.fill(block_id, block_hash, subject_of(block_hash))
                self.pool.publish(block_id, block_hash, parent, proof)
            parent = block_hash
        self.pool.give_back(ids)
        return True

    async def serve(self, order: Order) -> None:
        """Compute a prompt for a reader, chunk by chunk, under a lease."""
        try:
            ids = self.pool.take(order.num_blocks)
        except OutOfBlocks:
            return  # as if it had not been accepted: the reader waits for its offer in vain
        try:
            lease = self.exchange.open_lease(order.transfer_id, order.reader, order.num_blocks)
        except KVStoreError:
            self.pool.give_back(ids)
            return
        computing = asyncio.get_running_loop().create_task(self._compute(order, ids, lease))
        outcome = await lease.closed
        self.world.reach(f"lease: {outcome.value}")
        if outcome is not LeaseOutcome.CONFIRMED:
            computing.cancel()
        try:
            await computing
        except asyncio.CancelledError:
            self.world.reach("computing cut short")
        finally:
            self.pool.give_back(ids)

    async def _compute(self, order: Order, ids: Sequence[int], lease: Lease) -> None:
        first, parent = 0, None
        while first < order.num_blocks:
            await asyncio.sleep(self.random.uniform(0, self.habits.compute_s))
            if self.random.random() < self.habits.revoke:
                self.world.faults["revokes"] += 1
                lease.revoke("the owner thinks better of it")
                return
            end = min(order.num_blocks, first + self.random.randrange(1, 4))
            blocks = []
            for index in range(first, end):
                name = order.name(index)
                proof = self.pool.fill(ids[index], name, order.subject(index))
                block_hash = order.hashes[index] if index < len(order.hashes) else None
                if block_hash is not None:
                    self.pool.publish(ids[index], block_hash, parent, proof)
                    parent = BlockHash(name)
                blocks.append(AnnouncedBlock(ids[index], block_hash, proof))
            lease.announce(first, blocks, last=end == order.num_blocks)
            first = end
        if self.random.random() < self.habits.revoke:
            await asyncio.sleep(self.random.uniform(0, self.random.choice([0.01, 1.0])))
            self.world.faults["revokes"] += 1
            lease.revoke("the owner thinks better of it, late")
