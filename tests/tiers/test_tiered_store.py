"""DRAM over disk: blocks go down when evicted and come up when asked for, and no caller's end leaks a slot."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kvstore.block import BlockHash, HostMemory
from kvstore.errors import IntegrityError
from kvstore.pool.slot_book import Block
from kvstore.store import DiskTier, DiskWrites, StoreTier, TieredStore
from kvstore.store.disk_files import FileCalls
from kvstore.store.disk_tier import RETRY_AFTER_S
from tests.tiers.blocks import (
    BLOCK_BYTES,
    LAYOUT,
    chain,
    checksum_of,
    insert_block,
    locate,
    named_hash,
    parents,
    payload,
    proof,
)

DRAM, DISK = StoreTier.DRAM, StoreTier.DISK


class Gate:
    """A disk whose writes or reads can be held up, or fail."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.may_read = threading.Event()
        self.may_write.set()
        self.may_read.set()
        self.error: int | None = None

    def write(self, fd, buffers, offset):
        assert self.may_write.wait(30)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return os.pwritev(fd, buffers, offset)

    def read(self, fd, buffers, offset):
        assert self.may_read.wait(30)
        return os.preadv(fd, buffers, offset)

    def open_all(self) -> None:
        self.may_write.set()
        self.may_read.set()
        self.error = None


@contextlib.asynccontextmanager
async def open_store(
    directory: Path | None,
    num_slots: int = 8,
    disk_writes: DiskWrites = DiskWrites.ALL,
    gate: Gate | None = None,
    on_change=None,
    expected_pins: int = 0,
    max_bytes: int = 16 * 16_384,
) -> AsyncIterator[TieredStore]:
    disk = None
    if directory is not None:
        calls = FileCalls(write=gate.write, read=gate.read) if gate is not None else FileCalls()
        disk = DiskTier.open(
            directory, LAYOUT, max_bytes, calls=calls, clock=itertools.count(0, RETRY_AFTER_S).__next__
        )
    memory = HostMemory.allocate(num_slots, BLOCK_BYTES)
    store = TieredStore(memory, disk, disk_writes=disk_writes, on_change=on_change, timeout_s=20.0)
    try:
        yield store
        async with asyncio.timeout(20):
            await store.wait_until_idle()
        store.check_integrity(expected_pins)
        assert store.dram.num_private == 0
    finally:
        if gate is not None:
            gate.open_all()
        await store.close()


async def insert(store: TieredStore, hashes: list[BlockHash]) -> None:
    for block_hash, parent in zip(hashes, parents(hashes), strict=True):
        assert await insert_block(store, block_hash, parent)


async def take_in(store: TieredStore, hashes: list[BlockHash]) -> None:
    """As a fetch does, block by block, and without a care for the blocks before."""
    for block_hash, parent in zip(hashes, parents(hashes), strict=True):
        (slot,) = await store.reserve(1)
        store.memory.view(slot)[:] = payload(block_hash)
        assert store.publish(slot, block_hash, parent, proof(block_hash), checksum_of(block_hash))


def assert_right(store: TieredStore, pinned: list[Block], hashes: list[BlockHash]) -> None:
    assert [(pin.block_hash, pin.proof) for pin in pinned] == [(h, proof(h)) for h in hashes]
    for pin in pinned:
        assert store.memory.view(pin.slot).tobytes() == payload(pin.block_hash).tobytes()


def slots(pinned: list[Block]) -> list[int]:
    return [pin.slot for pin in pinned]


async def test_what_dram_gives_up_is_found_on_disk_and_comes_back_whole(tmp_path):
    a, b = chain("a", 6), chain("b", 6)
    async with open_store(tmp_path) as store:
        await insert(store, a)
        await insert(store, b)
        assert locate(store, a) == [DRAM] * 2 + [DISK] * 4
        pinned = await store.pin(a)
        assert_right(store, pinned, a)
        assert locate(store, [*a, named_hash("absent"), *b]) == [DRAM] * 6
        store.unpin(slots(pinned))
        stats = store.stats
        assert (stats.num_queried, stats.num_dram_hits, stats.num_disk_hits, store.disk.stats.num_read) == (6, 2, 4, 4)
        assert stats.num_lost == 0


async def test_without_a_disk_it_is_dram_alone():
    a, b = chain("a", 6), chain("b", 6)
    async with open_store(None) as store:
        await insert(store, a)
        await insert(store, b)
        assert locate(store, a) == [DRAM] * 2
        pinned = await store.pin(a)
        assert_right(store, pinned, a[:2])
        store.unpin(slots(pinned))
        assert await store.flush(20)


async def test_a_restart_keeps_everything_after_a_clean_end(tmp_path):
    a = chain("a", 6)
    async with open_store(tmp_path) as store:
        await insert(store, a)
    async with open_store(tmp_path) as store:
        assert sorted(store.contents()) == sorted((block_hash, DISK) for block_hash in a)
        pinned = await store.pin(a)
        assert_right(store, pinned, a)
        store.unpin(slots(pinned))


async def test_written_behind_blocks_leave_dram_at_no_cost(tmp_path):
    a, b = chain("a", 8), chain("b", 8)
    async with open_store(tmp_path, disk_writes=DiskWrites.ALL) as store:
        await insert(store, a)
        assert await store.flush(20)
        assert all(map(store.disk.contains, a))
        num_written = store.disk.stats.num_stored
        taken = await store.reserve(8)
        assert len(taken) == 8
        assert store.disk.stats.num_stored == num_written
        for slot, block_hash, parent in zip(taken, b, parents(b), strict=True):
            store.memory.view(slot)[:] = payload(block_hash)
            store.publish(slot, block_hash, parent, proof(block_hash), checksum_of(block_hash))
        assert await store.flush(20)
        assert locate(store, a) == [DISK] * 8


async def test_only_what_was_used_again_is_written_if_so_set(tmp_path):
    a, b = chain("a", 3), chain("b", 3)
    async with open_store(tmp_path, disk_writes=DiskWrites.REUSED) as store:
        await insert(store, a)
        await insert(store, b)
        store.unpin(slots(await store.pin(a)))
        assert await store.flush(20)
        assert sorted(store.disk.hashes()) == sorted(a)
        await insert(store, chain("c", 5))
    async with open_store(tmp_path, disk_writes=DiskWrites.NONE) as store:
        assert (len(locate(store, a)), locate(store, b)) == (3, [])
        await insert(store, chain("d", 8))
        assert sorted(store.disk.hashes()) == sorted(a)


async def test_an_index_that_follows_the_changes_knows_what_is_where(tmp_path):
    seen: set[tuple[BlockHash, StoreTier]] = set()

    def changed(block_hash, tier, is_present):
        assert ((block_hash, tier) in seen) != is_present
        (seen.add if is_present else seen.remove)((block_hash, tier))

    # Room for 12 blocks: the disk forgets, too.
    async with open_store(tmp_path, 4, DiskWrites.ALL, on_change=changed, max_bytes=4096 + 12 * 320) as store:
        for name in "abcdefgh":
            await insert(store, chain(name, 4))
            store.unpin(slots(await store.pin(chain("a", 4))))
        assert await store.flush(20)
        assert seen == set(store.contents())
        assert {block_hash for block_hash, tier in seen if tier is DISK} == set(store.disk.hashes())
        assert store.disk.stats.num_evicted > 0
        assert {block_hash for block_hash, tier in seen if tier is DRAM} == set(store.dram.hashes())


async def test_two_who_ask_for_the_same_prefix_read_it_once(tmp_path):
    a = chain("a", 6)
    async with open_store(tmp_path) as store:
        await insert(store, a)
        await insert(store, chain("b", 8))
        assert locate(store, a) == [DISK] * 6
        both = await asyncio.gather(store.pin(a), store.pin(a))
        for pinned in both:
            assert_right(store, pinned, a)
            store.unpin(slots(pinned))
        assert store.disk.stats.num_read == 6


async def test_pins_hold_through_any_pressure_and_reservations_get_the_rest(tmp_path):
    a = chain("a", 5)
    async with open_store(tmp_path) as store:
        await insert(store, a)
        pinned = await store.pin(a)
        for number in range(5):
            await insert(store, chain(f"flood{number}", 3))
        taken = await store.reserve(8)
        assert len(taken) == 3
        assert_right(store, pinned, a)
        store.abandon(taken)
        store.unpin(slots(pinned))


async def test_a_prefix_longer_than_dram_is_given_as_far_as_it_fits(tmp_path):
    a = chain("a", 20)
    async with open_store(tmp_path) as store:
        await take_in(store, a)
        assert len(locate(store, a)) == 20
        pinned = await store.pin(a)
        assert_right(store, pinned, a[:8])
        assert await store.pin(a[8:]) == []
        store.unpin(slots(pinned))
        rest = await store.pin(a[8:16])
        assert_right(store, rest, a[8:16])
        store.unpin(slots(rest))


async def test_a_chain_longer_than_dram_is_kept_as_far_as_it_fits_rather_than_with_holes():
    a = chain("a", 10)
    async with open_store(None) as store:
        await insert(store, a[:8])
        assert not await insert_block(store, a[8], a[7])
        assert locate(store, a) == [DRAM] * 8


async def test_a_corrupt_block_on_disk_ends_the_prefix_and_is_reported_gone(tmp_path):
    a = chain("a", 6)
    changes: list[tuple[BlockHash, StoreTier, bool]] = []
    async with open_store(tmp_path) as store:
        await insert(store, a)
    (path,) = tmp_path.glob("*.blocks")
    content = path.read_bytes()
    path.write_bytes(content.replace(payload(a[3]).tobytes(), bytes(BLOCK_BYTES)))
    async with open_store(tmp_path, on_change=lambda *change: changes.append(change)) as store:
        pinned = await store.pin(a)
        assert_right(store, pinned, a[:3])
        assert (a[3], DISK, False) in changes
        assert locate(store, a) == [DRAM] * 3
        assert store.disk.stats.num_corrupt == 1
        store.unpin(slots(pinned))


async def test_a_pin_at_its_deadline_gives_what_there_is_and_the_rest_comes_later(tmp_path):
    gate = Gate()
    a = chain("a", 6)
    async with open_store(tmp_path, gate=gate) as store:
        await insert(store, a)
        await insert(store, chain("b", 6))
        gate.may_read.clear()
        pinned = await store.pin(a, timeout_s=0.05)
        assert_right(store, pinned, a[:2])
        gate.may_read.set()
        rest = await store.pin(a[2:])
        assert_right(store, rest, a[2:])
        assert store.disk.stats.num_read == 4
        store.unpin(slots(pinned + rest))


async def test_a_cancelled_pin_gives_back_its_pins_and_its_slots(tmp_path):
    gate = Gate()
    a = chain("a", 6)
    async with open_store(tmp_path, gate=gate) as store:
        await insert(store, a)
        await insert(store, chain("b", 6))
        gate.may_read.clear()
        task = asyncio.create_task(store.pin(a))
        await asyncio.sleep(0)
        assert store._promoting
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.may_read.set()


async def test_nothing_is_evicted_before_it_is_written_and_a_reservation_waits_no_longer_than_its_deadline(tmp_path):
    gate = Gate()
    a = chain("a", 8)
    async with open_store(tmp_path, gate=gate) as store:
        gate.may_write.clear()
        await insert(store, a)
        assert await store.reserve(3, timeout_s=0.05) == []
        waiting = asyncio.create_task(store.reserve(3))
        await asyncio.sleep(0)
        assert locate(store, a) == [DRAM] * 8
        gate.may_write.set()
        taken = await waiting
        assert len(taken) == 3
        assert locate(store, a) == [DRAM] * 5 + [DISK] * 3
        store.abandon(taken)
        pinned = await store.pin(a)
        assert_right(store, pinned, a)
        store.unpin(slots(pinned))


async def test_a_block_that_is_dropped_while_it_waits_to_be_written_is_not(tmp_path):
    gate = Gate()
    a = chain("a", 3)
    async with open_store(tmp_path, gate=gate) as store:
        gate.may_write.clear()
        await insert(store, a[:1])
        await asyncio.sleep(0)
        await insert(store, a[1:])
        store.dram.drop([store.dram.find(a[2]).slot])
        gate.may_write.set()
        assert await store.flush(20)
        assert sorted(store.disk.hashes()) == sorted(a[:2])


async def test_a_cancelled_reservation_leaks_nothing(tmp_path):
    gate = Gate()
    async with open_store(tmp_path, gate=gate) as store:
        gate.may_write.clear()
        await insert(store, chain("a", 5))
        task = asyncio.create_task(store.reserve(8))
        await asyncio.sleep(0)
        assert store.dram.num_private == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.dram.num_private == 0
        gate.may_write.set()


async def test_on_a_full_disk_the_store_goes_on_in_dram_and_writes_again_later(tmp_path):
    gate = Gate()
    a, b, c = chain("a", 8), chain("b", 8), chain("c", 8)
    async with open_store(tmp_path, gate=gate) as store:
        await insert(store, a)
        assert await store.flush(20)
        store.unpin(slots(await store.pin(a)))
        on_disk = set(store.disk.hashes())
        gate.error = errno.ENOSPC
        await insert(store, b)
        assert await store.flush(20)
        assert locate(store, b) == [DRAM] * 8
        assert store.disk.is_paused
        assert set(store.disk.hashes()) == on_disk
        gate.error = None
        await insert(store, c)
        await insert(store, a)
        assert locate(store, c)
        assert not store.disk.is_paused
        assert all(map(store.disk.contains, c))


async def test_after_closing_nothing_is_given_and_what_was_lent_stays_readable(tmp_path):
    a = chain("a", 4)
    async with open_store(tmp_path, expected_pins=4) as store:
        await insert(store, a)
        pinned = await store.pin(a)
    assert (await store.reserve(1), await store.pin(a[:1] + chain("b", 1)))[0] == []
    assert_right(store, pinned, a)
    await store.close()


async def test_a_disk_that_hangs_does_not_keep_the_store_from_closing(tmp_path, monkeypatch):
    monkeypatch.setattr("kvstore.store.tiered_store._CLOSE_S", 0.1)
    gate = Gate()
    async with open_store(tmp_path, disk_writes=DiskWrites.ALL, gate=gate) as store:
        gate.may_write.clear()
        await insert(store, chain("a", 3))
        async with asyncio.timeout(20):  # a write hangs for 30
            await store.close(0.1)
        gate.open_all()


async def test_memory_and_disk_must_hold_blocks_of_one_size(tmp_path):
    with closing(DiskTier.open(tmp_path, LAYOUT, 100_000)) as disk, pytest.raises(ValueError, match="256 on disk"):
        TieredStore(HostMemory.allocate(2, 512), disk)


async def test_a_report_that_went_missing_is_found(tmp_path):
    async with open_store(tmp_path) as store:
        await take_in(store, chain("a", 12))
        assert await store.flush(20)
        store._reported_on_disk.pop()
        with pytest.raises(IntegrityError, match="11 blocks reported on disk, 12 are there"):
            store.check_integrity()
        store._reported_on_disk.update(store.disk.hashes())


async def test_books_are_sound_while_blocks_are_on_their_way_and_damage_is_found_then_too(tmp_path):
    gate, a = Gate(), chain("a", 3)
    async with open_store(tmp_path, gate=gate) as store:
        gate.may_write.clear()
        await insert(store, a)
        store.check_integrity()
        dropping = asyncio.create_task(store.drop([a[2]]))
        await asyncio.sleep(0)
        store.check_integrity()
        gate.may_write.set()
        await dropping
        await store.wait_until_idle()
        pinned = await store.pin(a[:1])
        store.check_integrity(expected_pins=1)
        with pytest.raises(IntegrityError, match="1 pins, their holders count 2"):
            store.check_integrity(expected_pins=2)
        store.unpin(block.slot for block in pinned)
        store.dram.drop([store.dram.find(each).slot for each in a[:2]])
        gate.may_read.clear()
        promoting = asyncio.create_task(store.pin(a[:2]))
        for _ in range(20):
            await asyncio.sleep(0)
        assert store.has_disk_jobs
        store.check_integrity()
        store.dram._free.append(store.dram._free[0])
        with pytest.raises(IntegrityError, match="listed 2 times as free"):
            store.check_integrity()
        store.dram._free.pop()
        gate.may_read.set()
        store.unpin(block.slot for block in await promoting)


def prompts(source: np.random.Generator) -> Iterator[list[BlockHash]]:
    while True:
        name, length = source.integers(6), int(source.integers(1, 9))
        yield (chain(f"shared{name % 3}", 4) + chain(f"own{name}", 5))[:length]


@pytest.mark.parametrize("disk_writes", list(DiskWrites))
async def test_many_users_at_once_always_read_the_right_bytes(tmp_path, disk_writes):
    async def use(store: TieredStore, number: int) -> int:
        source = np.random.default_rng(number)
        num_found = 0
        for prompt, _ in zip(prompts(source), range(25), strict=False):
            pinned = await store.pin(prompt, timeout_s=float(source.choice((0.0, 0.001, 20.0))))
            assert_right(store, pinned, prompt[: len(pinned)])
            num_found += len(pinned)
            if source.random() < 0.3:
                await asyncio.sleep(0.001)
            assert_right(store, pinned, prompt[: len(pinned)])
            for block_hash, parent in list(zip(prompt, parents(prompt), strict=True))[len(pinned) :]:
                await insert_block(store, block_hash, parent, timeout_s=0.5)
            store.unpin(slots(pinned))
        return num_found

    async with open_store(tmp_path, 24, disk_writes, max_bytes=16 * 9000) as store:
        assert sum(await asyncio.gather(*(use(store, number) for number in range(6)))) > 100
