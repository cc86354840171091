"""Lends the worker's paged cache to readers that name its blocks by hash: peers, and store nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstore.block import BlockHash, subject_of
from kvstore.protocol import AnnouncedBlock
from services.engine.api import Engine
from services.worker.engine_thread import EngineThread
from services.worker.prefixes.host_prefixes import HostPrefixes

log = logging.getLogger(__name__)


class CacheLender:
    """Lends the paged cache's blocks, each with the proof that it was published with, to readers that name them by
    hash. What the host tier has comes into the paged cache first, as far as there is room.
    """

    def __init__(self, engine: Engine, thread: EngineThread, host: HostPrefixes) -> None:
        self._engine = engine
        self._thread = thread
        self._host = host

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        await self._host.restore(hashes)
        return await self._thread.call(self._lend, hashes)

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        await self._thread.call(self._engine.release_blocks, [block.block_id for block in blocks])

    async def recheck(self, hashes: Sequence[BlockHash]) -> None:
        """Rechecks between two steps, so that nobody is lent or handed the blocks before we have looked."""
        num_dropped = await self._thread.call(self._engine.recheck, hashes)
        if num_dropped:
            log.error("%d of %d blocks have changed in memory, and are dropped", num_dropped, len(hashes))

    def _lend(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:  # engine thread
        block_ids = self._engine.lend_prefix(hashes)
        subjects = [subject_of(block_hash) for block_hash in hashes[: len(block_ids)]]
        return list(map(AnnouncedBlock, block_ids, hashes, self._engine.proofs(block_ids, subjects)))
