"""The whole store against a dumb set, with restarts, crashes, full disks and flipped bytes, in random order."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockHash, HostMemory
from kvstore.pool.slot_book import Block
from kvstore.store import DiskTier, DiskWrites, StoreTier, TieredStore
from kvstore.store.disk_files import FileCalls
from kvstore.store.disk_tier import RETRY_AFTER_S
from tests.tiers.blocks import BLOCK_BYTES, LAYOUT, chain, insert_block, locate, parents, payload

_HEAD = chain("head", 3)
PROMPTS = [_HEAD + chain("x", 3), _HEAD + chain("y", 4), _HEAD[:1] + chain("z", 3), chain("w", 6), chain("v", 4)]
NUM_SLOTS = 7
LARGE_DISK, SMALL_DISK = 40_000, 4096 + 9 * 320  # the small one holds 9 blocks

_Result = TypeVar("_Result")


class TieredStoreMachine(RuleBasedStateMachine):
    @initialize(disk_writes=st.sampled_from(DiskWrites), max_bytes=st.sampled_from([LARGE_DISK, SMALL_DISK]))
    def start(self, disk_writes: DiskWrites, max_bytes: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tandem-store-model-"))
        self.loop = asyncio.new_event_loop()
        self.disk_writes, self.max_bytes = disk_writes, max_bytes
        self.is_disk_full, self.is_disk_sound = False, True
        self.known: set[BlockHash] = set()  # all that was ever inserted
        # Where every block goes to disk before it is lost, nothing is lost as long as the disk has room and is sound.
        self.keeps_all = max_bytes == LARGE_DISK and disk_writes is DiskWrites.ALL
        self.pins: list[Block] = []
        self.open()

    def open(self) -> None:
        disk = DiskTier.open(
            self.directory,
            LAYOUT,
            self.max_bytes,
            calls=FileCalls(write=self.write),
            clock=itertools.count(0, RETRY_AFTER_S).__next__,
        )
        self.reported: set[tuple[BlockHash, StoreTier]] = {(block_hash, StoreTier.DISK) for block_hash in disk.hashes()}
        self.store = TieredStore(
            HostMemory.allocate(NUM_SLOTS, BLOCK_BYTES),
            disk,
            disk_writes=self.disk_writes,
            on_change=self.changed,
            timeout_s=20.0,
        )

    def write(self, fd: int, buffers: Any, offset: int) -> int:
        if self.is_disk_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        return os.pwritev(fd, buffers, offset)

    def changed(self, block_hash: BlockHash, tier: StoreTier, is_present: bool) -> None:
        assert ((block_hash, tier) in self.reported) != is_present
        (self.reported.add if is_present else self.reported.remove)((block_hash, tier))

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run it, and then all jobs that it has started."""

        async def to_the_end() -> _Result:
            result = await work
            await self.store.wait_until_idle()
            await asyncio.sleep(0)
            return result

        return self.loop.run_until_complete(to_the_end())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.is_disk_full = False
            try:
                self.run(self.store.close())
            finally:
                self.loop.close()
                shutil.rmtree(self.directory)

    @rule(prompt=st.sampled_from(PROMPTS), length=st.integers(1, 7))
    def insert(self, prompt: list[BlockHash], length: int) -> None:
        for block_hash, parent in list(zip(prompt, parents(prompt), strict=True))[:length]:
            had_room = not self.pins and len(prompt) <= NUM_SLOTS
            is_new = not self.store.dram.contains(block_hash)
            is_in = self.run(insert_block(self.store, block_hash, parent))
            assert is_in == is_new or not had_room
            if is_in:
                self.known.add(block_hash)
                assert self.store.tier_of(block_hash) is StoreTier.DRAM

    @rule(prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3))
    def pin_at_once(self, prompts: list[list[BlockHash]]) -> None:
        async def pin_all() -> list[list[Block]]:
            return await asyncio.gather(*map(self.store.pin, prompts))

        located = [len(locate(self.store, prompt)) for prompt in prompts]
        for prompt, length, pinned in zip(prompts, located, self.run(pin_all()), strict=True):
            assert [pin.block_hash for pin in pinned] == prompt[: len(pinned)]
            assert len(pinned) <= length
            if self.keeps_all and len(prompts) == 1 and not self.pins and length <= NUM_SLOTS:
                assert len(pinned) == length
            self.pins += pinned

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, len(self.pins)))):
            pin = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
            self.store.unpin([pin.slot])

    @rule(num_blocks=st.integers(1, 9))
    def reserve_and_abandon(self, num_blocks: int) -> None:
        slots = self.run(self.store.reserve(num_blocks))
        assert len(slots) == len(set(slots)) <= num_blocks
        assert {pin.slot for pin in self.pins}.isdisjoint(slots)
        for slot in slots:
            self.store.memory.view(slot)[:] = 0xEE
        self.store.abandon(slots)

    @rule()
    def restart(self) -> None:
        self.pins.clear()
        self.run(self.store.close())
        self.open()

    @rule()
    def crash(self) -> None:
        """What is on disk stays, the rest is lost."""
        self.pins.clear()
        on_disk = set(self.store.disk.hashes())
        self.store.disk.close()
        self.open()
        found = set(self.store.disk.hashes())
        # A block whose place was to be overwritten on a full disk may still be whole, and is found again.
        assert found <= self.known
        assert found == on_disk or not self.is_disk_sound
        if self.is_disk_sound:
            self.known = found

    @rule()
    def let_the_disk_fill_up(self) -> None:
        self.is_disk_full, self.is_disk_sound, self.keeps_all = True, False, False

    @rule()
    def make_room_on_disk(self) -> None:
        self.is_disk_full = False

    @rule(data=st.data())
    def flip_a_byte_on_disk(self, data: st.DataObject) -> None:
        paths = [path for path in sorted(self.directory.glob("tandem.*")) if path.stat().st_size]
        if paths:
            path = data.draw(st.sampled_from(paths))
            offset = data.draw(st.integers(0, path.stat().st_size - 1))
            with open(path, "r+b") as file:
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ 0x10]))
            self.is_disk_sound, self.keeps_all = False, False

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity(expected_pins=len(self.pins))
        assert self.reported == set(self.store.contents())
        for pin in self.pins:
            assert self.store.memory.view(pin.slot).tobytes() == payload(pin.block_hash).tobytes()
        present = {block_hash for block_hash, _ in self.reported}
        if self.keeps_all:
            assert present == self.known


TestTieredStoreAgainstASet = TieredStoreMachine.TestCase
TestTieredStoreAgainstASet.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
