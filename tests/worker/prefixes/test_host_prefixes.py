"""A worker's host tier in use: restores that run beside each other, are cancelled, take too long, or serve a peer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import torch

from kvstore.block import BlockHash
from kvstore.pool import HostTier
from kvstore.threads import OsThreads
from services.engine.api import Request, StepOutput
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.worker.engine_thread import EngineThread
from services.worker.prefixes import CacheLender, HostPrefixes
from tests.hf_models import write_model
from tests.proofs import prove

NUM_BLOCKS = 25
CHAIN = [BlockHash(bytes([1, i]) * 8) for i in range(20)]
JUNK = [BlockHash(bytes([2, i]) * 8) for i in range(NUM_BLOCKS)]


class Listener:
    def on_begun(self, request: Request) -> None: ...

    def on_step(self, output: StepOutput) -> None: ...


class World:
    """An engine on its thread. The blocks' content is made up: nothing is computed here."""

    def __init__(self, engine: Engine, timeout_s: float = 30.0) -> None:
        assert engine.host_tier is not None
        self.engine = engine
        self.tier: HostTier = engine.host_tier
        self.thread = EngineThread(engine, OsThreads())
        self.thread.start(Listener())
        self.prefixes = HostPrefixes(engine, self.thread, OsThreads(), timeout_s)

    async def cache(self, hashes: Sequence[BlockHash]) -> None:
        await self.thread.call(self._cache, hashes)

    def _cache(self, hashes: Sequence[BlockHash]) -> None:
        taken = self.engine.take_prefix(hashes)
        assert taken is not None
        for block_id, block_hash in zip(taken.block_ids, hashes, strict=True):
            self.engine.kv_cache[block_id].view(torch.uint8).fill_(block_hash[1] + 1)
        self.engine.publish_blocks(taken.block_ids, hashes, prove(self.engine.memory, taken.block_ids, hashes))
        self.engine.release_blocks(taken.block_ids)

    async def evict(self, num_blocks: int = NUM_BLOCKS) -> None:
        """Others take so many blocks, and what they evict can be found."""
        await self.thread.call(self._take, num_blocks)

    def _take(self, num_blocks: int) -> None:
        taken = self.engine.take_prefix(JUNK[:num_blocks])
        assert taken is not None
        self.engine.release_blocks(taken.block_ids)

    def check_content(self) -> None:
        for block_hash in CHAIN[: self.engine.pool.peek_prefix(CHAIN)]:
            (block_id,) = self.engine.pool.match_prefix([block_hash])
            content = self.engine.kv_cache[block_id].view(torch.uint8)
            assert bool((content == block_hash[1] + 1).all()), "wrong bytes under a hash"
            self.engine.pool.release([block_id])

    @property
    def num_cached(self) -> int:
        return self.engine.pool.peek_prefix(CHAIN)

    async def close(self) -> None:
        await self.prefixes.settle()
        await self.thread.call(self.engine.check_integrity)
        assert self.engine.load().num_lent_blocks == 0
        await self.thread.stop()
        self.check_content()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("model") / "llama3", "llama3", seed=3)


@pytest.fixture
async def world(model: Path) -> AsyncIterator[World]:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        block_size=16,
        max_model_len=400,
        num_gpu_blocks_override=NUM_BLOCKS,
        kv_offloading_size=0.01,
    )
    world = World(Engine.from_config(config))
    yield world
    await world.close()


class SlowCopies:
    """Stands before the tier's copier: copies back only when it is let go."""

    def __init__(self, tier: HostTier) -> None:
        self._copier = tier._copier
        self.has_begun = threading.Event()
        self.may_go = threading.Event()
        tier._copier = self

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        self._copier.copy_out(block_ids, slots)

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        self.has_begun.set()
        assert self.may_go.wait(30)
        self._copier.copy_in(slots, block_ids)


async def test_a_prefix_comes_back_right_after_its_eviction(world: World) -> None:
    await world.cache(CHAIN)
    await world.thread.call(world._take, NUM_BLOCKS)
    await world.prefixes.restore(CHAIN)
    assert world.num_cached == 20


async def test_runs_here_and_there_join_to_one_prefix(world: World) -> None:
    await world.cache(CHAIN[5:10])
    await world.cache(CHAIN[15:])
    await world.cache(CHAIN[10:15])
    await world.cache(CHAIN[:5])
    await world.evict(15)  # the five that are free, and the ten that were used least recently
    assert [world.engine.pool.peek_prefix([each]) for each in CHAIN] == [1] * 5 + [0] * 5 + [1] * 5 + [0] * 5
    await world.prefixes.restore(CHAIN)
    assert world.num_cached == 20
    assert world.tier.stats.num_restored == 10


async def test_many_who_want_the_same_copy_it_once(world: World) -> None:
    await world.cache(CHAIN)
    await world.evict()
    await asyncio.gather(*(world.prefixes.restore(CHAIN) for _ in range(16)))
    assert world.num_cached == 20
    assert world.tier.stats.num_restored == 20


async def test_one_who_is_cancelled_leaves_the_rest_to_the_others(world: World) -> None:
    await world.cache(CHAIN)
    await world.evict()
    copies = SlowCopies(world.tier)
    first, second = (asyncio.create_task(world.prefixes.restore(CHAIN)) for _ in range(2))
    assert await asyncio.to_thread(copies.has_begun.wait, 30)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    copies.may_go.set()
    await second
    assert world.num_cached == 20


async def test_whoever_waits_too_long_goes_on_without(world: World) -> None:
    await world.cache(CHAIN)
    await world.evict()
    copies = SlowCopies(world.tier)
    impatient = HostPrefixes(world.engine, world.thread, OsThreads(), timeout_s=0.05)
    await impatient.restore(CHAIN)
    assert world.num_cached == 0
    copies.may_go.set()
    await impatient.settle()
    assert world.num_cached == 20, "it came all the same"


async def test_without_room_nothing_comes_and_nothing_is_held(world: World) -> None:
    await world.cache(CHAIN)
    await world.evict()
    taken = await world.thread.call(world.engine.take_prefix, JUNK[:10])
    assert taken is not None
    await world.prefixes.restore(CHAIN)
    assert world.num_cached == 0
    await world.thread.call(world.engine.release_blocks, taken.block_ids)


async def test_a_peer_is_lent_what_was_evicted(world: World) -> None:
    await world.cache(CHAIN)
    await world.evict(15)
    assert 0 < world.num_cached < 20
    lender = CacheLender(world.engine, world.thread, world.prefixes)
    blocks = await lender.lend_prefix(CHAIN)
    assert [block.block_hash for block in blocks] == CHAIN
    assert [block.proof for block in blocks] == prove(world.engine.memory, [block.block_id for block in blocks], CHAIN)
    await lender.take_back(blocks)


async def test_what_a_reader_suspects_is_looked_at_and_dropped_only_if_it_has_changed(world: World) -> None:
    await world.cache(CHAIN)
    lender = CacheLender(world.engine, world.thread, world.prefixes)
    blocks = await lender.lend_prefix(CHAIN)
    await lender.recheck(CHAIN)
    assert world.num_cached == 20
    world.engine.kv_cache[blocks[7].block_id].view(torch.uint8)[:] ^= 1
    await lender.recheck([*CHAIN[5:9], JUNK[0]])
    assert (world.num_cached, world.engine.pool.stats.num_corrupt) == (7, 1)
    await world.thread.call(world.engine.publish_blocks, [blocks[7].block_id], [CHAIN[7]], [blocks[7].proof], CHAIN[6])
    assert world.num_cached == 7, "whoever still holds it cannot make it findable again"
    await lender.take_back(blocks)


async def test_a_failed_copy_gives_everything_back_and_fails_no_request(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenCopies(SlowCopies):
        def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
            raise RuntimeError("no such device")

    await world.cache(CHAIN)
    await world.evict()
    BrokenCopies(world.tier)
    await world.prefixes.restore(CHAIN)
    assert world.num_cached == 0
    assert "no such device" in caplog.text
