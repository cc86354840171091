"""DRAM over disk: what a store node keeps, lends and takes in. One event loop owns it; the disk works in threads.

    in      reserve -> the caller fills slots -> publish          (or insert, which copies)
    out     pin: blocks in DRAM at once, the rest of the prefix promoted from disk -> a lease reads -> unpin
    down    written behind, soon after publication, or when evicted from DRAM, as `DiskWrites` says

A block may be in both tiers, and mostly is: one whose copy is on disk already leaves DRAM at no cost. A slot belongs
at every moment to DRAM, to a caller, or to one disk job (`_Job`), and a job lives until its thread has let go of the
slot: neither a deadline nor a cancelled caller ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore.block_hash import BlockHash
from kvstore.disk_jobs import DiskJobs
from kvstore.disk_tier import DiskTier, StoredBlock
from kvstore.dram_tier import DramTier, PinnedBlock, ResidentBlock
from kvstore.errors import IntegrityError
from kvstore.eviction import DEFAULT_PROTECTED_SHARE
from kvstore.memory import HostMemory

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

_JOB_BYTES = 2 * 1024 * 1024  # of one hop to a thread: long against the hop, short against a deadline
_PROMOTE_BYTES = 64 * 1024 * 1024  # reserved at a time by one `pin`: what DRAM gives up for it at once
_MAX_FRUITLESS_ROUNDS = 3  # of one `pin`, when others evict what it promotes


class StoreTier(Enum):
    """Where a store has a block."""

    DRAM = "dram"
    DISK = "disk"


class DiskWrites(Enum):
    """Which blocks go to disk, and when.

    ALL: every block soon after its publication, so that little is lost with the process. REUSED: a block that was used
    at least once, soon after that use. EVICTED: a block that leaves DRAM, then. NONE: the disk is only read.
    """

    ALL = "all"
    REUSED = "reused"
    EVICTED = "evicted"
    NONE = "none"


@dataclass
class StoreStats:
    """Counts since the start, in blocks."""

    num_queried: int = 0  # hashes given to pin
    num_dram_hits: int = 0  # of these, in DRAM already
    num_disk_hits: int = 0  # of these, promoted or waited for
    num_promoted: int = 0
    num_written: int = 0  # blocks given to the disk tier, whether it took them or not
    num_lost: int = 0  # evicted from DRAM, wanted on disk and not there: the disk was full, failing or busy


class _Job:
    """One batch in a disk thread. `task` ends when the thread has, and never by cancellation."""

    def __init__(self, hashes: list[BlockHash], slots: list[int], task: asyncio.Task[None]) -> None:
        self.hashes = hashes
        self.slots = slots
        self.task = task


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
        self._busy: dict[BlockHash, _Job] = {}  # on its way up, or down after its eviction
        self._reserving: dict[BlockHash, asyncio.Event] = {}  # by the first block that memory is reserved to promote
        self._unwritten: dict[BlockHash, None] = {}  # in DRAM, to be written behind; in order
        self._write_behind: asyncio.Task[None] | None = None
        self._batch_written: asyncio.Event | None = None  # while a batch is pinned to be written behind
        self._jobs: set[asyncio.Task[None]] = set()
        self._is_closed = False

    # -- what is there --

    def tier_of(self, block_hash: BlockHash) -> StoreTier | None:
        """Return the best tier that has the block. No I/O, no use. DISK may turn out to be wrong when it is read."""
        if self.dram.contains(block_hash):
            return StoreTier.DRAM
        if self.disk is not None and (block_hash in self._busy or self.disk.contains(block_hash)):
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
            while len(slots) < num_blocks and self._batch_written is not None and loop.time() < deadline:
                async with asyncio.timeout_at(deadline):
                    await self._batch_written.wait()
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
            self._unwritten.pop(evicted.block_hash, None)
            if self._belongs_on_disk(evicted, is_leaving=True):
                to_write.append(evicted)
            else:
                slots.append(evicted.slot)
        if not to_write:
            return slots
        jobs = [self._start_demotion(batch) for batch in self._batches(to_write)]
        ended: list[_Job] = []
        try:
            await _wait(jobs, deadline - asyncio.get_running_loop().time())
            ended = [job for job in jobs if job.task.done()]
        except asyncio.CancelledError:
            self.dram.abandon(slots)
            raise
        finally:
            for job in jobs:
                if job not in ended:
                    self._abandon_at_end(job)
        return slots + [slot for job in ended for slot in job.slots]

    def publish(self, slot: int, block_hash: BlockHash, parent_hash: BlockHash | None, digest: int) -> bool:
        """Make a private slot findable, as `DramTier.publish`, and see to its copy on disk."""
        is_new = self.dram.publish(slot, block_hash, parent_hash, digest)
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
        digest: int,
        payload: npt.NDArray[np.uint8],
        timeout_s: float | None = None,
    ) -> bool:
        """Copy a block in; False if there was no room, or it is in DRAM already."""
        if self.dram.contains(block_hash):
            return False
        slots = await self.reserve(1, timeout_s, after=parent_hash)
        for slot in slots:
            self.dram.memory.view(slot)[:] = payload
            return self.publish(slot, block_hash, parent_hash, digest)
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
                while self._write_behind is not None:
                    await asyncio.wait([self._write_behind])
                if self._disk_jobs is not None:
                    await self._disk_jobs.sync()
        except (TimeoutError, OSError) as error:
            logger.warning("%d blocks are not written yet: %r", len(self._unwritten), error)
            return False
        return not self._unwritten

    async def close(self, timeout_s: float = 30.0) -> None:
        """Write what belongs on disk until the deadline, let every job end, close the disk. Again: does nothing.

        Under `DiskWrites.EVICTED` all of DRAM belongs there now. From here on `reserve` and `pin` give nothing; the
        memory stays as it is, for leases that have not ended.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._write_soon(list(self.dram.hashes()), is_leaving=True)
        await self.flush(timeout_s)
        self._unwritten.clear()
        while self._jobs:
            await asyncio.wait(list(self._jobs))  # each as long as the disk takes for a batch
        if self._disk_jobs is not None:
            await self._disk_jobs.close()

    def check_integrity(self, expected_pins: int | None = None) -> None:
        """Raise `IntegrityError` unless both tiers are sound and agree with what was reported. While no job runs."""
        if self._jobs or self._busy:
            raise IntegrityError(f"{len(self._jobs)} disk jobs run, for {len(self._busy)} blocks")
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

    def _start_demotion(self, blocks: list[ResidentBlock]) -> _Job:
        hashes = [block.block_hash for block in blocks]
        job = _Job(hashes, [block.slot for block in blocks], self._spawn(self._write(blocks)))
        self._note_busy(job)

        def count_lost(_: object) -> None:
            self.stats.num_lost += sum(self.tier_of(block_hash) is None for block_hash in hashes)

        job.task.add_done_callback(count_lost)
        return job

    def _abandon_at_end(self, job: _Job) -> None:
        job.task.add_done_callback(lambda _: self.dram.abandon(job.slots))

    def _write_soon(self, hashes: Iterable[BlockHash], is_leaving: bool = False) -> None:
        for block_hash in hashes:
            block = self.dram.find(block_hash)
            if block is not None and self._belongs_on_disk(block, is_leaving):
                self._unwritten[block_hash] = None
        if self._unwritten and self._write_behind is None:
            self._write_behind = self._spawn(self._write_all_behind())

    async def _write_all_behind(self) -> None:
        try:
            while self._unwritten:
                pins: list[PinnedBlock] = []
                while self._unwritten and len(pins) < self._blocks_per_job:
                    block_hash = next(iter(self._unwritten))
                    del self._unwritten[block_hash]
                    pins += self.dram.pin([block_hash], is_use=False)
                blocks = [block for block in (self.dram.find(pin.block_hash) for pin in pins) if block is not None]
                written = self._batch_written = asyncio.Event()
                try:
                    await self._write(blocks)
                finally:
                    self.dram.unpin(pin.slot for pin in pins)
                    self._batch_written = None
                    written.set()
                if self.disk is not None and self.disk.is_paused:
                    self._unwritten.clear()  # they are tried again when they leave DRAM
        finally:
            self._write_behind = None

    async def _write(self, blocks: list[ResidentBlock]) -> None:
        assert self._disk_jobs is not None, "nothing belongs on a disk that is not there"
        changed = await self._disk_jobs.write(blocks)
        self.stats.num_written += len(blocks)
        self._report_disk(changed)

    # -- up --

    async def _promote(self, hashes: Sequence[BlockHash], deadline: float) -> bool:
        """Bring a part of the prefix to DRAM, starting with the first block; False: no use to try again."""
        loop = asyncio.get_running_loop()
        under_way = self._busy.get(hashes[0])
        if under_way is not None:
            await _wait([under_way], deadline - loop.time())
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
        await _wait(jobs, deadline - loop.time())
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
            return self.tier_of(block_hash) is StoreTier.DISK and block_hash not in self._busy

        return list(itertools.islice(itertools.takewhile(is_on_disk_only, hashes), self._blocks_per_promotion))

    def _start_promotion(self, wanted: list[tuple[BlockHash, int]]) -> _Job:
        hashes, slots = [block_hash for block_hash, _ in wanted], [slot for _, slot in wanted]
        job = _Job(hashes, slots, self._spawn(self._read(wanted)))
        self._note_busy(job)
        return job

    async def _read(self, wanted: list[tuple[BlockHash, int]]) -> None:
        assert self._disk_jobs is not None, "nothing is found on a disk that is not there"
        private = {slot for _, slot in wanted}
        try:
            results = await self._disk_jobs.read(wanted)
            for (block_hash, slot), result in zip(wanted, results, strict=True):
                if isinstance(result, StoredBlock):
                    private.remove(slot)
                    self.stats.num_promoted += self.dram.publish(slot, block_hash, result.parent_hash, result.digest)
        finally:
            self.dram.abandon(private)
            self._report_disk(block_hash for block_hash, _ in wanted)

    # -- jobs and reports --

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._job_ended)
        return task

    def _job_ended(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a disk job failed", exc_info=task.exception())

    def _note_busy(self, job: _Job) -> None:
        self._busy.update(dict.fromkeys(job.hashes, job))

        def forget(_: object) -> None:
            for block_hash in job.hashes:
                if self._busy.get(block_hash) is job:
                    del self._busy[block_hash]

        job.task.add_done_callback(forget)

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


async def _wait(jobs: list[_Job], timeout_s: float) -> None:
    """Wait for jobs without ever cancelling one."""
    await asyncio.wait([job.task for job in jobs], timeout=max(0.0, timeout_s))
