"""Writes blocks of a store's memory to disk, batch by batch.

A block has a reference of ours from the moment it is queued until its write has ended or was refused: so it is not
evicted before, and whoever wants its room waits for the disk. Nothing is written at an eviction.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum

from kvstore.block import BlockHash
from kvstore.pool import Block, SlotBook


class DiskWrites(Enum):
    """Which blocks go to disk. ALL: soon after publication; REUSED: soon after reuse; NONE: the disk is only read."""

    ALL = "all"
    REUSED = "reused"
    NONE = "none"


class WriteBehind:
    """Queues blocks and writes them in a task. `write` puts a batch on disk and says whether the disk takes more: where
    not, what is queued is refused, and offered again at its next use.
    """

    def __init__(self, book: SlotBook, write: Callable[[list[Block]], Awaitable[bool]], blocks_per_batch: int) -> None:
        self._book = book
        self._write = write
        self._blocks_per_batch = blocks_per_batch
        self._queue: deque[Block] = deque()
        self._held: set[BlockHash] = set()  # queued or being written
        self._task: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()

    @property
    def num_held(self) -> int:
        """Blocks that are queued or being written."""
        return len(self._held)

    def add(self, block_hash: BlockHash) -> None:
        """Queue a block of the book, unless it is queued already."""
        if block_hash in self._held:
            return
        self._queue += self._book.pin([block_hash], is_use=False)
        self._held.add(block_hash)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._write_all(), name="write-behind")

    def refuse(self) -> None:
        """Let go of all that are queued and not being written yet."""
        self._let_go([self._queue.popleft() for _ in range(len(self._queue))])

    async def progress(self) -> None:
        """Wait until some of the blocks can be evicted again."""
        await self._progress.wait()

    async def wait_until_idle(self) -> None:
        """Wait until all that is queued, now or meanwhile, is written or refused."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _write_all(self) -> None:
        try:
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(self._blocks_per_batch, len(self._queue)))]
                takes_more = False
                try:
                    takes_more = await self._write(batch)
                finally:
                    self._let_go(batch)
                if not takes_more:
                    self.refuse()
        finally:
            self.refuse()
            self._task = None

    def _let_go(self, blocks: list[Block]) -> None:
        self._held.difference_update(block.block_hash for block in blocks)
        self._book.release([block.slot for block in blocks])
        self._progress.set()
        self._progress = asyncio.Event()
