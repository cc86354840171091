"""Keeps a node's blocks in DRAM over disk. One event loop owns it; the disk works in threads.

    in      reserve -> the caller fills slots -> publish
    out     pin: blocks in DRAM at once, the rest of the prefix promoted from disk -> a lease reads -> unpin
    down    write_behind.py: soon after publication or use, as `DiskWrites` says, and before it can be evicted

A block may be in both tiers, and mostly is. A slot belongs at every moment to DRAM, to a caller, or to a promotion,
which lives until its thread has let go of the slot: neither a deadline nor a cancelled caller ends it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from kvstore.block import BlockHash, Checksum, HostMemory, Proof
from kvstore.errors import IntegrityError
from kvstore.pool import (
    PROTECTED_SHARE,
    Block,
    CacheChange,
    CacheEvent,
    SlotBook,
)
from kvstore.store.disk_results import GetFailure, StoredBlock
from kvstore.store.disk_tier import DiskTier
from kvstore.store.write_behind import DiskWrites, WriteBehind
from kvstore.threads import OsThreads, Threads

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_JOB_BYTES = 2 * 1024 * 1024  # of one hop to a thread: long against the hop, short against a deadline
_PROMOTE_BYTES = 64 * 1024 * 1024  # reserved at a time by one `pin`: what DRAM gives up for it at once
_NUM_DISK_THREADS = 2
_MAX_FRUITLESS_ROUNDS = 3  # of one `pin`, when others evict what it promotes
_CLOSE_S = 5.0  # after the flush: for the jobs under way to end, and for the disk to be closed


class StoreTier(Enum):
    """The tiers in which a store has a block."""

    DRAM = "dram"
    DISK = "disk"


@dataclass
class StoreStats:
    """Counts since the start, in blocks."""

    num_queried: int = 0  # hashes given to pin
    num_dram_hits: int = 0  # of these, in DRAM already
    num_disk_hits: int = 0  # of these, promoted or waited for
    num_lost: int = 0  # evicted from DRAM, wanted on disk and not there: the disk had refused them


class TieredStore:
    """One pool of memory and, unless `disk` is None, one disk tier, which the store closes.

    `on_change(block_hash, tier, is_present)` is called in the event loop when a tier has gained or lost a block; what
    the disk holds at the start is in `contents`. `timeout_s` bounds `reserve` and `pin` where they get none.
    """

    def __init__(
        self,
        memory: HostMemory,
        disk: DiskTier | None,
        *,
        disk_writes: DiskWrites = DiskWrites.ALL,
        on_change: Callable[[BlockHash, StoreTier, bool], None] | None = None,
        timeout_s: float = 5.0,
        threads: Threads | None = None,
    ) -> None:
        """`threads`: the real ones by default; the disk's work goes there."""
        if disk is not None and disk.layout.block_bytes != memory.block_bytes:
            raise ValueError(f"blocks of {memory.block_bytes} bytes in memory, {disk.layout.block_bytes} on disk")
        self.memory = memory
        self.dram = SlotBook(
            memory.num_blocks, PROTECTED_SHARE, on_change=self._dram_changed, on_evict=self._dram_evicted
        )
        self.disk = disk
        self.stats = StoreStats()
        self._threads = (threads or OsThreads()).pool("disk-tier", _NUM_DISK_THREADS)
        self._disk_writes = disk_writes
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._blocks_per_job = max(1, _JOB_BYTES // memory.block_bytes)
        self._blocks_per_promotion = max(1, _PROMOTE_BYTES // memory.block_bytes)
        self._reported_on_disk: set[BlockHash] = set(disk.hashes()) if disk is not None else set()
        self._promoting: dict[BlockHash, asyncio.Task[None]] = {}
        self._write_behind = WriteBehind(self.dram, self._write, self._blocks_per_job)
        self._num_drops = 0  # that the disk has not been through
        self._is_closed = False
        self._disk_jobs: set[object] = set()
        self.num_disk_jobs_ended = 0
        """For who watches that the disk gets on; one of two that end in the same moment may be missing."""

    # -- what is there --

    def tier_of(self, block_hash: BlockHash) -> StoreTier | None:
        """Return the best tier that has the block. No I/O, no use. DISK may turn out to be wrong when it is read."""
        if self.dram.contains(block_hash):
            return StoreTier.DRAM
        return StoreTier.DISK if self.disk is not None and self.disk.contains(block_hash) else None

    @property
    def num_to_write(self) -> int:
        """Blocks in DRAM that are queued for the disk or being written."""
        return self._write_behind.num_held

    @property
    def has_disk_jobs(self) -> bool:
        """Whether the disk has been asked for something that it has not done yet. Any thread."""
        return bool(self._disk_jobs)

    def contents(self) -> Iterator[tuple[BlockHash, StoreTier]]:
        """Iterate over a snapshot of all blocks of both tiers: what an index is told anew after it forgot."""
        resident, stored = self.dram.hashes(), list(self._reported_on_disk)
        yield from ((block_hash, StoreTier.DRAM) for block_hash in resident)
        yield from ((block_hash, StoreTier.DISK) for block_hash in stored)

    # -- in --

    async def reserve(self, num_blocks: int, timeout_s: float | None = None) -> list[int]:
        """Return up to `num_blocks` private slots, evicting; fewer if pins, or the disk at the deadline, hold the rest.

        What still has to be written is waited for: this is how a slow disk slows its writers down. The caller fills the
        slots, then gives each to `publish` or `abandon`. It pins the block that they follow, or that may give way.
        """
        slots: list[int] = []
        try:
            async with asyncio.timeout(self._timeout_s if timeout_s is None else timeout_s):
                while not self._is_closed:
                    slots += self.dram.take(num_blocks - len(slots))
                    if len(slots) == num_blocks or not self._write_behind.num_held:
                        break
                    await self._write_behind.progress()
        except TimeoutError:
            pass  # fewer, then
        except BaseException:
            self.abandon(slots)
            raise
        return slots

    def publish(
        self, slot: int, block_hash: BlockHash, parent_hash: BlockHash | None, proof: Proof, checksum: Checksum
    ) -> bool:
        """Make a private slot that has been filled findable and the store's, and see to its copy on disk.

        If the block is here already, that one stays, the slot becomes free, and this returns False.
        """
        is_new = self.dram.publish(slot, block_hash, parent_hash, proof, checksum=checksum)
        if is_new:
            self._write_soon([block_hash])
        self.dram.release([slot])
        return is_new

    def abandon(self, slots: Iterable[int]) -> None:
        """Give private slots back unpublished."""
        self.dram.release(list(slots))

    # -- out --

    async def pin(self, hashes: Sequence[BlockHash], timeout_s: float | None = None) -> list[Block]:
        """Pin the longest prefix of `hashes` that the tiers give until the deadline; blocks on disk come to DRAM first.

        Each pinned block needs one `unpin`. What the disk gives later is in DRAM for the next one to ask.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._timeout_s if timeout_s is None else timeout_s)
        self.stats.num_queried += len(hashes)
        pinned = self.dram.pin(hashes)
        self.stats.num_dram_hits += len(pinned)
        num_fruitless = 0
        try:
            while len(pinned) < len(hashes) and num_fruitless < _MAX_FRUITLESS_ROUNDS and not self._is_closed:
                rest = hashes[len(pinned) :]
                may_give_more = await self._promote(rest, deadline)
                found = self.dram.pin(rest)
                self.stats.num_disk_hits += len(found)
                num_fruitless = 0 if found else num_fruitless + 1
                pinned += found
                if not may_give_more:
                    break
        except BaseException:
            self.unpin(block.slot for block in pinned)
            raise
        self._write_soon(block.block_hash for block in pinned)
        return pinned

    def unpin(self, slots: Iterable[int]) -> None:
        """Give back one pin on each slot."""
        self.dram.release(list(slots))

    async def drop(self, hashes: Sequence[BlockHash]) -> int:
        """Forget blocks in both tiers; how many were here. Whoever has one pinned keeps it."""
        num_here = sum(self.tier_of(block_hash) is not None for block_hash in hashes)
        self.dram.drop(block.slot for each in hashes if (block := self.dram.find(each)) is not None)
        disk = self.disk
        if disk is not None and not self._is_closed:
            self._num_drops += 1
            try:
                await self._in_thread(lambda: [disk.drop(block_hash) for block_hash in hashes])
                self._report_disk(hashes)
            finally:
                self._num_drops -= 1
        return num_here

    # -- life --

    async def flush(self, timeout_s: float) -> bool:
        """Wait until all that is to be written behind is written and durable; False if at the deadline it is not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._write_behind.wait_until_idle()
                if self.disk is not None:
                    await self._in_thread(self.disk.sync)
        except (TimeoutError, OSError) as error:
            logger.warning("%d blocks are not written yet: %r", self._write_behind.num_held, error)
            return False
        return True

    async def close(self, timeout_s: float = 30.0) -> None:
        """Write what belongs on disk until the deadline, let every job end, close the disk. Again: does nothing.

        A disk that hangs is left as it is: what it has been given so far, the next process finds. From here on
        `reserve` and `pin` give nothing; the memory stays as it is, for leases that have not ended.
        """
        if self._is_closed:
            return
        self._write_soon(self.dram.hashes())
        self._is_closed = True
        await self.flush(timeout_s)
        self._write_behind.refuse()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self.wait_until_idle()
                if self.disk is not None:
                    await self._in_thread(self.disk.close)
        except TimeoutError:
            logger.error("the disk hangs: not closed, %g s after the last write was asked for", _CLOSE_S)
        finally:
            self._threads.shutdown(wait=False)

    async def wait_until_idle(self) -> None:
        """Wait until no block is on its way between the tiers: each job takes as long as the disk does for a batch."""
        await self._write_behind.wait_until_idle()
        while self._promoting:
            await asyncio.wait(set(self._promoting.values()))

    def check_integrity(self, expected_pins: int | None = None) -> None:
        """Raise `IntegrityError` unless both tiers' books are sound. At any time, in the event loop.

        What is on its way between the tiers changes pins and reports. Only while nothing is are they compared, too:
        the pins with `expected_pins`, as its holders count them, those of private slots left out, and what was reported
        with what the disk has.
        """
        self.dram.check_integrity()
        if self.disk is not None:
            self.disk.check_integrity()
        if self._promoting or self._write_behind.num_held or self._num_drops:
            return
        num_pins = self.dram.num_references_held - self.dram.num_private
        if expected_pins is not None and num_pins != expected_pins:
            raise IntegrityError(f"DRAM: {num_pins} pins, their holders count {expected_pins}")
        if self.disk is not None and self._reported_on_disk != set(self.disk.hashes()):
            raise IntegrityError(f"{len(self._reported_on_disk)} blocks reported on disk, {len(self.disk)} are there")

    # -- down --

    def _belongs_on_disk(self, block: Block) -> bool:
        if self.disk is None or self._disk_writes is DiskWrites.NONE or self.disk.contains(block.block_hash):
            return False
        return block.was_reused or self._disk_writes is DiskWrites.ALL

    def _write_soon(self, hashes: Iterable[BlockHash]) -> None:
        if self.disk is None or self._is_closed:
            return
        for block_hash in hashes:
            block = self.dram.find(block_hash)
            if block is not None and self._belongs_on_disk(block):
                self._write_behind.add(block_hash)

    async def _write(self, blocks: list[Block]) -> bool:
        """Put blocks on disk, as far as it takes them; whether it takes more."""
        disk = self.disk
        assert disk is not None, "nothing belongs on a disk that is not there"

        sound = [block for block in blocks if self.dram.hash_of(block.slot) == block.block_hash]  # dropped meanwhile

        def put_all() -> list[BlockHash]:
            changed: list[BlockHash] = []
            for block in sound:
                assert block.checksum is not None, "publish gives one"
                payload = self.memory.view(block.slot)
                result = disk.put(block.block_hash, block.parent_hash, block.proof, block.checksum, payload)
                changed += (block.block_hash, *result.evicted)
            return changed

        changed = await self._in_thread(put_all)
        self._report_disk(changed)
        return not disk.is_paused

    # -- up --

    async def _promote(self, hashes: Sequence[BlockHash], deadline: float) -> bool:
        """Bring a part of the prefix to DRAM, starting with the first block; False: no use to try again.

        Who asks for what is on its way up already waits for that.
        """
        task = self._promoting.get(hashes[0])
        if task is None:
            wanted = list(itertools.takewhile(self._is_promotable, hashes[: self._blocks_per_promotion]))
            if not wanted:
                return False
            task = asyncio.get_running_loop().create_task(self._bring_up(wanted, deadline), name="promotion")
            self._promoting.update(dict.fromkeys(wanted, task))
        await asyncio.wait([task], timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        return task.done()

    def _is_promotable(self, block_hash: BlockHash) -> bool:
        return self.tier_of(block_hash) is StoreTier.DISK and block_hash not in self._promoting

    async def _bring_up(self, hashes: list[BlockHash], deadline: float) -> None:
        """Runs as its own task, until the disk has let go of the slots, whatever becomes of those who wait."""
        try:
            slots = await self.reserve(len(hashes), deadline - asyncio.get_running_loop().time())
            wanted = list(zip(hashes, slots, strict=False))
            size = self._blocks_per_job
            await asyncio.gather(*(self._read(wanted[at : at + size]) for at in range(0, len(wanted), size)))
        except Exception:
            logger.exception("bringing %d blocks up from the disk failed", len(hashes))
        finally:
            for block_hash in hashes:
                del self._promoting[block_hash]

    async def _read(self, wanted: list[tuple[BlockHash, int]]) -> None:
        disk, private = self.disk, {slot for _, slot in wanted}
        assert disk is not None, "nothing is found on a disk that is not there"

        def get_all() -> list[StoredBlock | GetFailure]:
            return [disk.get(block_hash, self.memory.view(slot)) for block_hash, slot in wanted]

        try:
            results = await self._in_thread(get_all)
            for (block_hash, slot), result in zip(wanted, results, strict=True):
                if isinstance(result, StoredBlock):
                    private.remove(slot)
                    self.publish(slot, block_hash, result.parent_hash, result.proof, result.checksum)
        finally:
            self.abandon(private)
            self._report_disk(block_hash for block_hash, _ in wanted)

    # -- threads and reports --

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        """Cancelling this does not end the work, nor free what it uses: only tasks that nobody cancels await it."""

        def job() -> _Result:
            try:
                return work()
            finally:
                self._disk_jobs.discard(job)
                self.num_disk_jobs_ended += 1

        self._disk_jobs.add(job)
        return await asyncio.get_running_loop().run_in_executor(self._threads, job)

    def _dram_changed(self, change: CacheChange) -> None:
        if self._on_change is not None and change.event is not CacheEvent.REUSED:
            self._on_change(change.block_hash, StoreTier.DRAM, change.event is CacheEvent.PUBLISHED)

    def _dram_evicted(self, blocks: Sequence[Block]) -> None:
        self.stats.num_lost += sum(map(self._belongs_on_disk, blocks))

    def _report_disk(self, hashes: Iterable[BlockHash]) -> None:
        """Report what has become of these on disk, as it is now: two jobs may end in another order than they wrote."""
        assert self.disk is not None, "only disk jobs change the disk"
        for block_hash in hashes:
            is_present = self.disk.contains(block_hash)
            if is_present == (block_hash in self._reported_on_disk):
                continue
            if is_present:
                self._reported_on_disk.add(block_hash)
            else:
                self._reported_on_disk.remove(block_hash)
            if self._on_change is not None:
                self._on_change(block_hash, StoreTier.DISK, is_present)
