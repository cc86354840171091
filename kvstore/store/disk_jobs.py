"""The disk tier's calls, off the event loop: batches of blocks between a pool and the disk, in a few threads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore.block import BlockHash, HostMemory
from kvstore.pool import ResidentBlock
from kvstore.store.disk_tier import DiskTier, GetFailure, StoredBlock


class DiskJobs:
    """Owns `disk` and the threads. Cancelling what awaits a job does not end the job: shield it, and wait for it."""

    def __init__(self, disk: DiskTier, memory: HostMemory, num_threads: int) -> None:
        self.disk = disk
        self._memory = memory
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="disk-tier")

    async def write(self, blocks: Sequence[ResidentBlock]) -> list[BlockHash]:
        """Put blocks out of their slots, which stay as they are meanwhile.

        Returns every hash whose presence on disk may have changed, the evicted ones included.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._put_all, tuple(blocks))

    async def read(self, wanted: Sequence[tuple[BlockHash, int]]) -> list[StoredBlock | GetFailure]:
        """Get blocks into slots that nobody else touches meanwhile; one result for each."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._get_all, tuple(wanted))

    async def sync(self) -> None:
        """Wait until what was written is durable. Raises OSError."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self.disk.sync)

    async def close(self) -> None:
        """Close the disk tier, once all jobs have ended. May be given up: then it closes when the disk lets it."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self.disk.close)
        finally:
            self._executor.shutdown(wait=False)

    def _put_all(self, blocks: tuple[ResidentBlock, ...]) -> list[BlockHash]:
        changed: list[BlockHash] = []
        for block in blocks:
            payload = self._memory.view(block.slot)
            result = self.disk.put(block.block_hash, block.parent_hash, block.proof, payload)
            changed += (block.block_hash, *result.evicted)
        return changed

    def _get_all(self, wanted: tuple[tuple[BlockHash, int], ...]) -> list[StoredBlock | GetFailure]:
        return [self.disk.get(block_hash, self._memory.view(slot)) for block_hash, slot in wanted]
