"""Which disk jobs run, and for which blocks. A job is one batch in a disk thread; nothing here ends one early."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from kvstore.block import BlockHash

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Job:
    """One batch in a disk thread. `task` ends when the thread has let go of the slots, and never by cancellation."""

    hashes: tuple[BlockHash, ...]
    slots: tuple[int, ...]
    task: asyncio.Task[object]


class JobTable:
    """Owns the tasks of all jobs until they end; a failure is logged. One event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._by_block: dict[BlockHash, Job] = {}

    @property
    def num_running(self) -> int:
        """Tasks that have not ended."""
        return len(self._tasks)

    @property
    def num_busy_blocks(self) -> int:
        """Blocks on their way between the tiers."""
        return len(self._by_block)

    def job_for(self, block_hash: BlockHash) -> Job | None:
        """The job that is moving this block."""
        return self._by_block.get(block_hash)

    def start(self, hashes: Sequence[BlockHash], slots: Sequence[int], work: Coroutine[object, object, object]) -> Job:
        """Run the work of moving these blocks from or to these slots."""
        job = Job(tuple(hashes), tuple(slots), self.spawn(work))
        self._by_block.update(dict.fromkeys(job.hashes, job))
        job.task.add_done_callback(lambda _: self._forget(job))
        return job

    def spawn(self, work: Coroutine[object, object, object]) -> asyncio.Task[object]:
        """Run work that moves no block from its tier."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def wait_until_idle(self) -> None:
        """Wait for every job, those included that start meanwhile: each as long as the disk takes for a batch."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _forget(self, job: Job) -> None:
        for block_hash in job.hashes:
            if self._by_block.get(block_hash) is job:
                del self._by_block[block_hash]

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a disk job failed", exc_info=task.exception())


async def wait_for_jobs(jobs: Sequence[Job], timeout_s: float) -> None:
    """Wait for jobs without ever cancelling one."""
    await asyncio.wait([job.task for job in jobs], timeout=max(0.0, timeout_s))
