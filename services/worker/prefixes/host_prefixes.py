"""Brings prefixes back from the host tier into the paged cache, for prompts and for peers.

    take blocks (engine) -> copy, verify (a thread) -> publish (engine)

No UCX, and no step waits for it. A peer's blocks come back the same way: lending reads the paged pool, so its transfer
is like any other and one memory is registered for it. A block that has changed in main memory is found by its digest,
dropped, and computed again by whoever wanted it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from kvstore.block import BlockHash
from kvstore.threads import Threads
from services.engine.api import Engine, Restore
from services.worker.engine_thread import EngineCrashed, EngineThread
from services.worker.settling import settled

log = logging.getLogger(__name__)


class HostPrefixes:
    """Restores prefixes for one worker, with or without a host tier. Event loop only."""

    def __init__(self, engine: Engine, thread: EngineThread, threads: Threads, timeout_s: float) -> None:
        """`timeout_s`: how long whoever wants a prefix waits for it at most."""
        self._timeout_s = timeout_s
        self._engine = engine
        self._thread = thread
        self._under_way: dict[BlockHash, asyncio.Task[int]] = {}  # by the first block that is being brought back
        # One at a time: they share the memory's bandwidth with the steps.
        self._copying = threads.pool("host-restore")

    async def restore(self, hashes: Sequence[BlockHash]) -> None:
        """Make as much of the prefix cached as the host tier has, if there is room.

        What was begun ends by itself where this is cancelled, or takes too long. Raises EngineCrashed.
        """
        if self._engine.capabilities.num_host_blocks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await self._restore_all(hashes)

    async def _restore_all(self, hashes: Sequence[BlockHash]) -> None:
        """Run after run: cached blocks and the host tier's may take turns in a chain."""
        num_restored = 1
        while num_restored:
            # A hint, read from outside the engine's thread, which looks again.
            num_cached = self._engine.peek_prefix(hashes)
            if num_cached == len(hashes) or not self._engine.may_restore(hashes[num_cached]):
                return
            first = hashes[num_cached]
            task = self._under_way.get(first)
            if task is None:
                task = self._under_way[first] = asyncio.create_task(self._restore(first, hashes))
            num_restored = await asyncio.shield(task)

    async def _restore(self, first: BlockHash, hashes: Sequence[BlockHash]) -> int:
        """Bring one run back; the number of its blocks."""
        try:
            restore = await self._thread.call(self._engine.begin_restore, hashes)
            if restore is None:
                return 0
            return await self._fill(restore)
        except EngineCrashed:
            raise
        except Exception:
            # Whatever it is costs a recompute, and no request: all of them may be waiting for this one run.
            log.exception("a prefix could not be brought back from the host tier")
            return 0
        finally:
            del self._under_way[first]

    async def _fill(self, restore: Restore) -> int:
        try:
            await asyncio.get_running_loop().run_in_executor(self._copying, restore.copy_back)
        finally:
            copied = await self._thread.call(restore.end)
        num_corrupt = copied.is_whole.count(False)
        if num_corrupt:
            log.error(
                "%d of %d blocks had changed in the host tier, and are dropped", num_corrupt, len(copied.is_whole)
            )
        return copied.num_whole

    async def settle(self) -> None:
        """Wait until all that was begun has ended, and end the threads."""
        await settled(self._under_way.values(), "blocks coming back from the host tier")
        self._copying.shutdown(wait=False)
