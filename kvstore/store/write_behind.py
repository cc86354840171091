"""Blocks in DRAM that go to disk although nothing presses: batch by batch, each pinned while it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum

from kvstore.block import BlockHash
from kvstore.pool import DramTier, PinnedBlock, ResidentBlock
from kvstore.store.job_table import JobTable


class DiskWrites(Enum):
    """Which blocks go to disk, and when.

    ALL: every block soon after its publication, so that little is lost with the process. REUSED: a block that was used
    at least once, soon after that use. EVICTED: a block that leaves DRAM, then. NONE: the disk is only read.
    """

    ALL = "all"
    REUSED = "reused"
    EVICTED = "evicted"
    NONE = "none"


class WriteBehind:
    """The queue of blocks to be written and the task that writes them. `write` puts a batch on disk and says whether
    the disk takes more: where not, what is queued is dropped, and tried again when it leaves DRAM.
    """

    def __init__(
        self,
        dram: DramTier,
        jobs: JobTable,
        write: Callable[[list[ResidentBlock]], Awaitable[bool]],
        blocks_per_batch: int,
    ) -> None:
        self._dram = dram
        self._jobs = jobs
        self._write = write
        self._blocks_per_batch = blocks_per_batch
        self._queue: dict[BlockHash, None] = {}  # in order
        self._task: asyncio.Task[object] | None = None
        self.batch_written: asyncio.Event | None = None
        """While a batch is pinned, what is set when it can be evicted again."""

    @property
    def num_queued(self) -> int:
        """Blocks of which no batch has been made yet."""
        return len(self._queue)

    def add(self, hashes: Iterable[BlockHash]) -> None:
        """Queue blocks, at the end unless they are queued already."""
        self._queue.update(dict.fromkeys(hashes))
        if self._queue and self._task is None:
            self._task = self._jobs.spawn(self._write_all())

    def forget(self, block_hash: BlockHash) -> None:
        """Leave a block out, which somebody else takes care of."""
        self._queue.pop(block_hash, None)

    def clear(self) -> None:
        """Leave out all that are queued."""
        self._queue.clear()

    async def wait_until_idle(self) -> None:
        """Wait until all that is queued, now or meanwhile, is written."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _write_all(self) -> None:
        try:
            while self._queue:
                if not await self._write_batch():
                    self._queue.clear()
        finally:
            self._task = None

    async def _write_batch(self) -> bool:
        pins: list[PinnedBlock] = []
        while self._queue and len(pins) < self._blocks_per_batch:
            block_hash = next(iter(self._queue))
            del self._queue[block_hash]
            pins += self._dram.pin([block_hash], is_use=False)
        blocks = [block for block in (self._dram.find(pin.block_hash) for pin in pins) if block is not None]
        written = self.batch_written = asyncio.Event()
        try:
            return await self._write(blocks)
        finally:
            self._dram.unpin(pin.slot for pin in pins)
            self.batch_written = None
            written.set()
