"""Prefixes that several holders have parts of: each block moves once, and a holder's death costs one piece."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash, HostMemory
from kvstore.exchange import BlockExchange, PeerIdentity
from kvstore.pool import BlockPool
from kvstore.protocol import AnnouncedBlock, Reservation
from kvstore.threads import OsThreads
from services.engine.api import Capabilities
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.scheduler import Scheduler
from services.rates import RateLearner
from services.worker.prefixes import FetchCosts, HostPrefixes, PrefixFetcher, Shunned
from tests.memory_transport import MemoryTransport
from tests.peers import PROOFS
from tests.proofs import KEY, prove
from tests.store_node.store_world import LAYOUT, PATIENT, Worker, World, chain, world

NUM_BLOCKS = 40
PIECE = 4
CHAIN = chain("prompt", 20)


class Cache:
    """The engine's part in a fetch, without a model: its pool and its loans."""

    def __init__(self, num_blocks: int) -> None:
        self.layout = LAYOUT
        self.capabilities = Capabilities(
            1024, 64, num_blocks, 0, caches_prefixes=True, kv_cache_dtype="float32", is_exact=True, compute={}
        )
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(SchedulerConfig(LAYOUT.block_size, 1024, "ab12"), self.pool)
        self.peek_prefix = self.pool.peek_prefix
        self.release_blocks = self.scheduler.release_lent
        self.publish_blocks = self.scheduler.publish_lent

    def take_prefix(self, hashes: Sequence[BlockHash]) -> Reservation | None:
        return self.scheduler.take_prefix(hashes)


class SmallPieces(FetchCosts):
    """Fetches PIECE blocks at once."""

    def piece_tokens(self, holder_id: str, tier: str) -> int:
        return PIECE * LAYOUT.block_size


class Thread:
    """An engine thread between two steps: every command runs at once."""

    def call(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(function(*args))
        return future


class Reader:
    """A worker that fetches, in pieces of PIECE blocks."""

    def __init__(self, made: World, num_blocks: int = NUM_BLOCKS, timeout_s: float = 20.0) -> None:
        self.memory = HostMemory.allocate(num_blocks, LAYOUT.block_bytes)
        self.cache = Cache(num_blocks)
        transport = MemoryTransport(self.memory, made.switchboard, None, seed=9)
        identity = PeerIdentity("reader/1", "prefill", "1", LAYOUT)
        self.exchange = BlockExchange(identity, self.memory, [transport], PATIENT, proof_key=KEY, keys=PROOFS.blocks)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        costs = SmallPieces(RateLearner(), LAYOUT.block_bytes // LAYOUT.block_size, "always")
        cache: Any = self.cache
        thread: Any = Thread()
        host = HostPrefixes(cache, thread, OsThreads(), timeout_s)
        self.fetcher = PrefixFetcher("reader", cache, thread, self.exchange, host, costs, timeout_s, self._count)

    def _count(self, tier: str, outcome: str, *_: int) -> None:
        self.outcomes[tier, outcome] += 1

    def hold(self, hashes: Sequence[BlockHash]) -> None:
        """Have computed these."""
        taken = self.cache.take_prefix(hashes)
        assert taken is not None
        self.cache.publish_blocks(taken.block_ids, hashes, prove(self.memory, taken.block_ids, hashes))
        self.cache.release_blocks(taken.block_ids)

    def check(self, hashes: Sequence[BlockHash], holder: Holder, first: int = 0) -> None:
        """These are cached, with the holder's bytes from `first` on, and nothing is lent any more."""
        block_ids = self.cache.pool.match_prefix(hashes)
        assert len(block_ids) == len(hashes)
        for block_id, block_hash in list(zip(block_ids, hashes, strict=True))[first:]:
            np.testing.assert_array_equal(self.memory.view(block_id), holder.memory.view(holder.slots[block_hash]))
        self.cache.pool.release(block_ids)
        self.cache.scheduler.check_integrity()
        assert self.cache.pool.num_free == self.cache.pool.num_blocks


class Holder(Worker):
    """Holds the first blocks of CHAIN. With `num_wants` it stops to answer after so many; takes `lend_s` for each."""

    def __init__(
        self, name: str, made: World, num_held: int, num_wants: int | None = None, lend_s: float = 0.0
    ) -> None:
        super().__init__(name, made.switchboard)
        self.name = name
        self.hold(CHAIN[:num_held])
        self.num_wants = num_wants
        self.lend_s = lend_s
        self.is_stuck = asyncio.Event()

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        if self.num_wants is not None and len(self.wanted) == self.num_wants:
            self.is_stuck.set()
            self.may_lend.clear()
        await asyncio.sleep(self.lend_s)
        return await super().lend_prefix(hashes)

    def source(self, num_blocks: int | None = None, tier: str = "device") -> pb.PrefixSource:
        return pb.PrefixSource(
            holder_id=self.name,
            incarnation="1",
            kv_address=self.exchange.address,
            num_blocks=len(self.slots) if num_blocks is None else num_blocks,
            tier=tier,
        )

    @property
    def wanted_ranges(self) -> list[tuple[int, int]]:
        """Which blocks of CHAIN were asked for, want by want."""
        return [(CHAIN.index(hashes[0]), CHAIN.index(hashes[-1]) + 1) for hashes in self.wanted]


@asynccontextmanager
async def running(made: World, *holders: Holder, **reader_options: Any) -> AsyncIterator[Reader]:
    reader = Reader(made, **reader_options)
    for each in (reader, *holders):
        await each.exchange.start("127.0.0.1", 0)
    try:
        yield reader
    finally:
        for holder in holders:
            holder.may_lend.set()
        for each in (reader, *holders):
            await each.exchange.close()
        await reader.fetcher.settle()


async def die(holder: Holder) -> None:
    """End its connections while it owes an answer."""
    await holder.is_stuck.wait()
    closing = asyncio.create_task(holder.exchange.close())
    await asyncio.sleep(0)  # it has begun: no answer goes out any more
    holder.may_lend.set()
    await closing


def parts_of(parts: Sequence[pb.FetchedPrefix]) -> list[tuple[str, int, int]]:
    return [(part.holder_id, part.num_blocks, part.num_bytes // LAYOUT.block_bytes) for part in parts]


async def test_the_holder_of_the_longest_prefix_gives_all_of_it_piece_by_piece() -> None:
    async with world() as made:
        short, long = Holder("short", made, 10), Holder("long", made, 20)
        async with running(made, short, long) as reader:
            parts = await reader.fetcher.fetch(CHAIN, [short.source(), long.source()])
            assert parts_of(parts) == [("long", 20, 20)]
            assert long.wanted_ranges == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
            assert short.wanted == []
            assert reader.outcomes == {("device", "ok"): 5}
            reader.check(CHAIN, long)


async def test_what_is_here_is_neither_asked_for_nor_moved() -> None:
    async with world() as made:
        holder = Holder("holder", made, 10)
        async with running(made, holder) as reader:
            reader.hold(CHAIN[:7])
            parts = await reader.fetcher.fetch(CHAIN, [holder.source()])
            assert parts_of(parts) == [("holder", 3, 3)]
            assert holder.wanted_ranges == [(7, 10)]
            reader.check(CHAIN[:10], holder, first=7)


async def test_a_holder_that_has_lost_its_head_still_gives_the_rest() -> None:
    async with world() as made:
        holder = Holder("holder", made, 10)
        for block_hash in CHAIN[:5]:
            del holder.slots[block_hash]
        async with running(made, holder) as reader:
            reader.hold(CHAIN[:6])
            assert parts_of(await reader.fetcher.fetch(CHAIN, [holder.source(10)])) == [("holder", 4, 4)]
            reader.check(CHAIN[:10], holder, first=6)


async def test_a_shorter_holder_has_more_left_than_the_longer_one_promised() -> None:
    """The index said 20 of "evicted", which has dropped the end; another goes on where it ends."""
    async with world() as made:
        evicted, other = Holder("evicted", made, 6), Holder("other", made, 15)
        async with running(made, evicted, other) as reader:
            parts = await reader.fetcher.fetch(CHAIN, [evicted.source(20), other.source()])
            assert parts_of(parts) == [("evicted", 6, 6), ("other", 9, 9)]
            assert other.wanted_ranges == [(6, 10), (10, 14), (14, 15)]
            reader.check(CHAIN[:15], other)


async def test_what_came_before_a_holder_died_is_kept_and_another_goes_on() -> None:
    async with world() as made:
        dying, other = Holder("dying", made, 20, num_wants=2), Holder("other", made, 17)
        async with running(made, dying, other) as reader:
            fetching = asyncio.create_task(reader.fetcher.fetch(CHAIN, [dying.source(), other.source()]))
            await die(dying)
            assert parts_of(await fetching) == [("dying", 8, 8), ("other", 9, 9)]
            assert other.wanted_ranges == [(8, 12), (12, 16), (16, 17)]
            await reader.fetcher.settle()
            reader.check(CHAIN[:17], other)
        assert reader.outcomes["device", "ok"] == 2 + 3


async def test_what_came_before_the_last_holder_died_is_kept_and_the_rest_is_left_to_computing() -> None:
    async with world() as made:
        dying = Holder("dying", made, 20, num_wants=3)
        async with running(made, dying) as reader:
            fetching = asyncio.create_task(reader.fetcher.fetch(CHAIN, [dying.source()]))
            await die(dying)
            assert parts_of(await fetching) == [("dying", 12, 12)]
            await reader.fetcher.settle()
            reader.check(CHAIN[:12], dying)
            assert reader.cache.pool.peek_prefix(CHAIN) == 12


async def test_what_came_before_the_deadline_is_kept() -> None:
    async with world() as made:
        slow = Holder("slow", made, 20, num_wants=1)
        async with running(made, slow, timeout_s=2.0) as reader:
            parts = await reader.fetcher.fetch(CHAIN, [slow.source()])
            assert parts_of(parts) == [("slow", 4, 4)]
            assert reader.outcomes == {("device", "ok"): 1, ("device", "timeout"): 1}
            assert reader.fetcher.shunned == ["slow"]
            slow.may_lend.set()
            await reader.fetcher.settle()
            reader.check(CHAIN[:4], slow)


async def test_a_client_that_hangs_up_gets_no_holder_shunned() -> None:
    async with world() as made:
        holder = Holder("holder", made, 20, num_wants=1)
        async with running(made, holder) as reader:
            fetching = asyncio.create_task(reader.fetcher.fetch(CHAIN, [holder.source()]))
            await holder.is_stuck.wait()
            fetching.cancel()
            await asyncio.wait([fetching])
            assert reader.fetcher.shunned == []
            assert reader.outcomes == {("device", "ok"): 1, ("device", "aborted"): 1}
            holder.may_lend.set()
            assert parts_of(await reader.fetcher.fetch(CHAIN, [holder.source()])) == [("holder", 16, 16)]
            reader.check(CHAIN, holder)


async def test_no_deadline_ends_a_fetch_whose_blocks_still_flow() -> None:
    """Five pieces of 0.8 s each, and nothing may come for 3 s."""
    async with world() as made:
        holder = Holder("holder", made, 20, lend_s=0.8)
        async with running(made, holder, timeout_s=3.0) as reader:
            assert parts_of(await reader.fetcher.fetch(CHAIN, [holder.source()])) == [("holder", 20, 20)]
            assert reader.fetcher.shunned == []
            reader.check(CHAIN, holder)


async def test_no_holder_is_shunned_because_our_own_pool_took_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as made:
        holder = Holder("holder", made, 20)
        async with running(made, holder, timeout_s=1.0) as reader:
            await reader.exchange.connect(holder.exchange.address)  # which is not what takes too long
            busy: asyncio.Future[Reservation | None] = asyncio.get_running_loop().create_future()
            monkeypatch.setattr(reader.fetcher._thread, "call", lambda *_: busy)
            assert await reader.fetcher.fetch(CHAIN, [holder.source()]) == []
            assert (reader.outcomes, reader.fetcher.shunned) == ({("device", "timeout"): 1}, [])
            monkeypatch.undo()
            busy.set_result(None)  # at last: there is no room


def test_holders_that_were_shunned_long_ago_are_forgotten() -> None:
    now_s = 0.0
    shunned = Shunned(lambda: now_s)
    for number in range(100):
        now_s += 10.0
        shunned.add(str(number))
    assert list(shunned._until_s) == ["99"]
    assert shunned.names() == ["99"]
    now_s += 5.0
    assert shunned.names() == []


async def test_holders_that_hang_cost_a_prompt_one_timeout_and_not_one_each() -> None:
    async with world() as made:
        first, second = Holder("first", made, 20, num_wants=0), Holder("second", made, 19, num_wants=0)
        async with running(made, first, second, timeout_s=0.5) as reader:
            for holder in (first, second):
                await reader.exchange.connect(holder.exchange.address)  # they answer that still
            assert await reader.fetcher.fetch(CHAIN, [first.source(), second.source(19)]) == []
            assert reader.outcomes == {("device", "timeout"): 1}
            for holder in (first, second):
                holder.may_lend.set()
            await reader.fetcher.settle()


async def test_a_liar_gives_nothing_and_another_goes_on() -> None:
    async with world() as made:
        liar, honest = Holder("liar", made, 20), Holder("honest", made, 12)
        liar.lies = True
        async with running(made, liar, honest) as reader:
            parts = await reader.fetcher.fetch(CHAIN, [liar.source(), honest.source()])
            assert parts_of(parts) == [("honest", 12, 12)]
            assert reader.outcomes == {("device", "digest"): 1, ("device", "ok"): 3}
            await reader.fetcher.settle()
            reader.check(CHAIN[:12], honest)


async def test_prompts_with_one_prefix_fetch_it_once_together() -> None:
    async with world() as made:
        holder = Holder("holder", made, 20)
        async with running(made, holder) as reader:
            fetches = [reader.fetcher.fetch(CHAIN[:end], [holder.source(end)]) for end in (12, 20, 20)]
            parts = [parts_of(each) for each in await asyncio.gather(*fetches)]
            assert sum(num_blocks for part in parts for _, num_blocks, _ in part) == 20
            moved = [index for start, end in holder.wanted_ranges for index in range(start, end)]
            assert sorted(moved) == list(range(20))
            reader.check(CHAIN, holder)


async def test_a_pool_without_room_for_the_next_piece_keeps_what_it_has() -> None:
    async with world() as made:
        holder = Holder("holder", made, 20)
        async with running(made, holder, num_blocks=10) as reader:
            assert parts_of(await reader.fetcher.fetch(CHAIN, [holder.source()])) == [("holder", 8, 8)]
            assert reader.outcomes == {("device", "ok"): 2, ("device", "reserve_failed"): 1}
            await reader.fetcher.settle()
            reader.check(CHAIN[:8], holder)


async def test_a_head_that_was_evicted_meanwhile_ends_the_fetch_and_leaks_nothing() -> None:
    async with world() as made:
        holder = Holder("holder", made, 20, num_wants=1)
        async with running(made, holder) as reader:
            fetching = asyncio.create_task(reader.fetcher.fetch(CHAIN, [holder.source()]))
            await holder.is_stuck.wait()
            reader.cache.pool.release(reader.cache.pool.allocate(NUM_BLOCKS))  # whatever ran took all memory
            holder.may_lend.set()
            assert parts_of(await fetching) == [("holder", 4, 4)]
            await reader.fetcher.settle()
            reader.check([], holder)
            assert reader.outcomes["device", "reserve_failed"] == 1
