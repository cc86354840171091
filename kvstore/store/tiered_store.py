"""DRAM over disk: what a store node keeps, lends and takes in. One event loop owns it; the disk works in threads.

    in      reserve -> the caller fills slots -> publish          (or insert, which copies)
    out     pin: blocks in DRAM at once, the rest of the prefix promoted from disk -> a lease reads -> unpin
    down    written behind, soon after publication, or when evicted from DRAM, as `DiskWrites` says

A block may be in both tiers, and mostly is: one whose copy is on disk already leaves DRAM at no cost. A slot belongs
at every moment to DRAM, to a caller, or to one disk job (`Job`), and a job lives until its thread has let go of the
slot: neither a deadline nor a cancelled caller ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHash, HostMemory, Proof
from kvstore.errors import IntegrityError
from kvstore.pool import DEFAULT_PROTECTED_SHARE, DramTier, PinnedBlock, ResidentBlock
from kvstore.store.disk_jobs import DiskJobs
from kvstore.store.disk_tier import DiskTier, StoredBlock
from kvstore.store.job_table import Job, JobTable, wait_for_jobs
from kvstore.store.write_behind import DiskWrites, WriteBehind

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

_JOB_BYTES = 2 * 1024 * 1024  # of one hop to a thread: long against the hop, short against a deadline
_PROMOTE_BYTES = 64 * 1024 * 1024  # reserved at a time by one `pin`: what DRAM gives up for it at once
_MAX_FRUITLESS_ROUNDS = 3  # of one `pin`, when others evict what it promotes
_CLOSE_S = 5.0  # after the flush: for the jobs under way to end, and for the disk to be closed


class StoreTier(Enum):
    """Where a store has a block."""

    DRAM = "dram"
    DISK = "disk"


@dataclass
class StoreStats:
    """Counts since the start, in blocks."""

    num_queried: int = 0  # hashes given to pin
    num_dram_hits: int = 0  # of these, in DRAM already
    num_disk_hits: int = 0  # of these, promoted or waited for
    num_promoted: int = 0
    num_written: int = 0  # blocks given to the disk tier, whether it took them or not
    num_lost: int = 0  # evicted from DRAM, wanted on disk and not there: the disk was full, failing or busy


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
        num_disk_threads: int = 2,
        protected_share: float = DEFAULT_PROTECTED_SHARE,
    ) -> None:
        if disk is not None and disk.layout.block_bytes != memory.block_bytes:
            raise ValueError(f"blocks of {memory.block_bytes} bytes in memory, {disk.layout.block_bytes} on disk")
        self.dram = DramTier(memory, on_change=self._dram_changed, protected_share=protected_share)
        self.disk = disk
        self.stats = StoreStats()
        self._disk_jobs = DiskJobs(disk, memory, num_disk_threads) if disk is not None else None
        self._disk_writes = disk_writes
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._blocks_per_job = max(1, _JOB_BYTES // memory.block_bytes)
        self._blocks_per_promotion = max(1, _PROMOTE_BYTES // memory.block_bytes)
        self._reported_on_disk: set[BlockHash] = set(disk.hashes()) if disk is not None else set()
        self._reserving: dict[BlockHash, asyncio.Event] = {}  # by the first block that memory is reserved to promote
        self._jobs = JobTable()
        self._write_behind = WriteBehind(self.dram, self._jobs, self._write, self._blocks_per_job)
        self._is_closed = False

    # -- what is there --

    def tier_of(self, block_hash: BlockHash) -> StoreTier | None:
        """Return the best tier that has the block. No I/O, no use. DISK may turn out to be wrong when it is read."""
        if self.dram.contains(block_hash):
            return StoreTier.DRAM
        if self.disk is not None and (self._jobs.job_for(block_hash) is not None or self.disk.contains(block_hash)):
            return StoreTier.DISK
        return None

    def locate(self, hashes: Sequence[BlockHash]) -> list[StoreTier]:
        """Return the tiers of the consecutive prefix of `hashes` that is here. No I/O, no use."""
        tiers = map(self.tier_of, hashes)
        return [tier for tier in itertools.takewhile(lambda tier: tier is not None, tiers) if tier is not None]

    def contents(self) -> Iterator[tuple[BlockHash, StoreTier]]:
        """Iterate over a snapshot of all blocks of both tiers: what an index is told anew after it forgot."""
        resident, stored = list(self.dram.hashes()), list(self._reported_on_disk)
        yield from ((block_hash, StoreTier.DRAM) for block_hash in resident)
        yield from ((block_hash, StoreTier.DISK) for block_hash in stored)

    # -- in --

    async def reserve(
        self, num_blocks: int, timeout_s: float | None = None, after: BlockHash | None = None
    ) -> list[int]:
        """Return up to `num_blocks` private slots, evicting; fewer if pins, or the disk at the deadline, hold the rest.

        Evicted blocks that belong on disk and are not there are written first: this is how a slow disk slows its
        writers down. The caller fills the slots, then gives each to `publish` or `abandon`. `after` is the block that
        the new ones follow: it is not evicted for them.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._timeout_s if timeout_s is None else timeout_s)
        slots = await self._reserve_evictable(num_blocks, deadline, after)
        try:
            # What is pinned only to be written behind can be evicted in a moment.
            while len(slots) < num_blocks and loop.time() < deadline:
                batch_written = self._write_behind.batch_written
                if batch_written is None:
                    break
                async with asyncio.timeout_at(deadline):
                    await batch_written.wait()
                slots += await self._reserve_evictable(num_blocks - len(slots), deadline, after)
        except TimeoutError:
            pass  # fewer, then
        except BaseException:
            self.dram.abandon(slots)
            raise
        return slots

    async def _reserve_evictable(self, num_blocks: int, deadline: float, after: BlockHash | None) -> list[int]:
        if self._is_closed:
            return []
        slots = self.dram.take_free(num_blocks)
        to_write: list[ResidentBlock] = []
        while len(slots) + len(to_write) < num_blocks:
            evicted = self.dram.evict(keep=after)
            if evicted is None:
                break
            self._write_behind.forget(evicted.block_hash)
            if self._belongs_on_disk(evicted, is_leaving=True):
                to_write.append(evicted)
            else:
                slots.append(evicted.slot)
        if not to_write:
            return slots
        jobs = [self._start_demotion(batch) for batch in self._batches(to_write)]
        ended: list[Job] = []
        try:
            await wait_for_jobs(jobs, deadline - asyncio.get_running_loop().time())
            ended = [job for job in jobs if job.task.done()]
        except asyncio.CancelledError:
            self.dram.abandon(slots)
            raise
        finally:
            for job in jobs:
                if job not in ended:
                    self._abandon_at_end(job)
        return slots + [slot for job in ended for slot in job.slots]

    def publish(self, slot: int, block_hash: BlockHash, parent_hash: BlockHash | None, proof: Proof) -> bool:
        """Make a private slot findable, as `DramTier.publish`, and see to its copy on disk."""
        is_new = self.dram.publish(slot, block_hash, parent_hash, proof)
        if is_new and self._disk_writes is DiskWrites.ALL and not self._is_closed:
            self._write_soon([block_hash])
        return is_new

    def abandon(self, slots: Iterable[int]) -> None:
        """Give private slots back unpublished."""
        self.dram.abandon(slots)

    async def insert(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash | None,
        proof: Proof,
        payload: npt.NDArray[np.uint8],
        timeout_s: float | None = None,
    ) -> bool:
        """Copy a block in; False if there was no room, or it is in DRAM already."""
        if self.dram.contains(block_hash):
            return False
        slots = await self.reserve(1, timeout_s, after=parent_hash)
        for slot in slots:
            self.dram.memory.view(slot)[:] = payload
            return self.publish(slot, block_hash, parent_hash, proof)
        return False

    # -- out --

    async def pin(self, hashes: Sequence[BlockHash], timeout_s: float | None = None) -> list[PinnedBlock]:
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
            self.dram.unpin(block.slot for block in pinned)
            raise
        if self._disk_writes is DiskWrites.REUSED and not self._is_closed:
            self._write_soon([block.block_hash for block in pinned])
        return pinned

    def unpin(self, slots: Iterable[int]) -> None:
        """Give back one pin on each slot."""
        self.dram.unpin(slots)

    # -- life --

    async def flush(self, timeout_s: float) -> bool:
        """Wait until all that is to be written behind is written and durable; False if at the deadline it is not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._write_behind.wait_until_idle()
                if self._disk_jobs is not None:
                    await self._disk_jobs.sync()
        except (TimeoutError, OSError) as error:
            logger.warning("%d blocks are not written yet: %r", self._write_behind.num_queued, error)
            return False
        return self._write_behind.num_queued == 0

    async def close(self, timeout_s: float = 30.0) -> None:
        """Write what belongs on disk until the deadline, let every job end, close the disk. Again: does nothing.

        A disk that hangs is left as it is: what it has been given so far, the next process finds.
        Under `DiskWrites.EVICTED` all of DRAM belongs there now. From here on `reserve` and `pin` give nothing; the
        memory stays as it is, for leases that have not ended.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._write_soon(list(self.dram.hashes()), is_leaving=True)
        await self.flush(timeout_s)
        self._write_behind.clear()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._jobs.wait_until_idle()
                if self._disk_jobs is not None:
                    await self._disk_jobs.close()
        except TimeoutError:
            logger.error("the disk hangs: not closed, %g s after the last write was asked for", _CLOSE_S)

    def check_integrity(self, expected_pins: int | None = None) -> None:
        """Raise `IntegrityError` unless both tiers are sound and agree with what was reported. While no job runs."""
        if self._jobs.num_running or self._jobs.num_busy_blocks:
            raise IntegrityError(f"{self._jobs.num_running} disk jobs run, for {self._jobs.num_busy_blocks} blocks")
        self.dram.check_integrity(expected_pins)
        if self.disk is not None:
            self.disk.check_integrity()
            if self._reported_on_disk != set(self.disk.hashes()):
                raise IntegrityError(
                    f"{len(self._reported_on_disk)} blocks reported on disk, {len(self.disk)} are there"
                )

    # -- down --

    def _belongs_on_disk(self, block: ResidentBlock, is_leaving: bool) -> bool:
        if self.disk is None or self.disk.contains(block.block_hash) or self._disk_writes is DiskWrites.NONE:
            return False
        if self._disk_writes is DiskWrites.EVICTED:
            return is_leaving
        return block.was_reused or self._disk_writes is DiskWrites.ALL

    def _start_demotion(self, blocks: list[ResidentBlock]) -> Job:
        hashes = [block.block_hash for block in blocks]
        job = self._jobs.start(hashes, [block.slot for block in blocks], self._write(blocks))

        def count_lost(_: object) -> None:
            self.stats.num_lost += sum(self.tier_of(block_hash) is None for block_hash in hashes)

        job.task.add_done_callback(count_lost)
        return job

    def _abandon_at_end(self, job: Job) -> None:
        job.task.add_done_callback(lambda _: self.dram.abandon(job.slots))

    def _write_soon(self, hashes: Iterable[BlockHash], is_leaving: bool = False) -> None:
        found = map(self.dram.find, hashes)
        self._write_behind.add(
            block.block_hash for block in found if block is not None and self._belongs_on_disk(block, is_leaving)
        )

    async def _write(self, blocks: list[ResidentBlock]) -> bool:
        """Put blocks on disk, as far as it takes them; whether it takes more."""
        assert self._disk_jobs is not None, "nothing belongs on a disk that is not there"
        changed = await self._disk_jobs.write(blocks)
        self.stats.num_written += len(blocks)
        self._report_disk(changed)
        return not self._disk_jobs.disk.is_paused

    # -- up --

    async def _promote(self, hashes: Sequence[BlockHash], deadline: float) -> bool:
        """Bring a part of the prefix to DRAM, starting with the first block; False: no use to try again."""
        loop = asyncio.get_running_loop()
        under_way = self._jobs.job_for(hashes[0])
        if under_way is not None:
            await wait_for_jobs([under_way], deadline - loop.time())
            return under_way.task.done()
        reserving = self._reserving.get(hashes[0])
        if reserving is not None:  # by somebody who wants the same: two reservations would starve each other
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await reserving.wait()
            return reserving.is_set()
        slots = await self._reserve_for(hashes, deadline)
        # Others had their turns since: they may have evicted, brought or be bringing what was promotable.
        wanted = list(zip(self._promotable(hashes), slots, strict=False))
        self.dram.abandon(slots[len(wanted) :])
        if not wanted:
            return bool(slots)
        jobs = [self._start_promotion(batch) for batch in self._batches(wanted)]
        await wait_for_jobs(jobs, deadline - loop.time())
        return all(job.task.done() for job in jobs)

    async def _reserve_for(self, hashes: Sequence[BlockHash], deadline: float) -> list[int]:
        reserved = self._reserving[hashes[0]] = asyncio.Event()
        try:
            return await self.reserve(len(self._promotable(hashes)), deadline - asyncio.get_running_loop().time())
        finally:
            del self._reserving[hashes[0]]
            reserved.set()

    def _promotable(self, hashes: Sequence[BlockHash]) -> list[BlockHash]:
        def is_on_disk_only(block_hash: BlockHash) -> bool:
            return self.tier_of(block_hash) is StoreTier.DISK and self._jobs.job_for(block_hash) is None

        return list(itertools.islice(itertools.takewhile(is_on_disk_only, hashes), self._blocks_per_promotion))

    def _start_promotion(self, wanted: list[tuple[BlockHash, int]]) -> Job:
        return self._jobs.start(
            [block_hash for block_hash, _ in wanted], [slot for _, slot in wanted], self._read(wanted)
        )

    async def _read(self, wanted: list[tuple[BlockHash, int]]) -> None:
        assert self._disk_jobs is not None, "nothing is found on a disk that is not there"
        private = {slot for _, slot in wanted}
        try:
            results = await self._disk_jobs.read(wanted)
            for (block_hash, slot), result in zip(wanted, results, strict=True):
                if isinstance(result, StoredBlock):
                    private.remove(slot)
                    self.stats.num_promoted += self.dram.publish(slot, block_hash, result.parent_hash, result.proof)
        finally:
            self.dram.abandon(private)
            self._report_disk(block_hash for block_hash, _ in wanted)

    # -- batches and reports --

    def _batches(self, items: list[_Item]) -> Iterator[list[_Item]]:
        for start in range(0, len(items), self._blocks_per_job):
            yield items[start : start + self._blocks_per_job]

    def _dram_changed(self, block_hash: BlockHash, is_present: bool) -> None:
        if self._on_change is not None:
            self._on_change(block_hash, StoreTier.DRAM, is_present)

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
