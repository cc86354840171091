"""Tells the prefix index what a worker's paged cache and host tier hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kvstore.block import BlockHash
from kvstore.index import Tier
from kvstore.pool import CacheChange, CacheEvent
from services.engine.api import Engine
from services.node import IndexFeed, IndexMetrics


class WorkerIndexFeed(IndexFeed):
    """A worker's `IndexFeed`."""

    def __init__(
        self, redis_url: str, worker_id: str, incarnation: str, lease_s: float, engine: Engine, metrics: IndexMetrics
    ) -> None:
        super().__init__(redis_url, worker_id, incarnation, lease_s, lambda: _holdings(engine), metrics)

    def changed(self, changes: Sequence[CacheChange]) -> None:
        """Note which blocks of the paged cache became findable or were evicted, in this order."""
        self._tell(changes, Tier.DEVICE)

    def host_changed(self, changes: Sequence[CacheChange]) -> None:
        """Note the same of the host tier."""
        self._tell(changes, Tier.HOST)

    def _tell(self, changes: Sequence[CacheChange], tier: Tier) -> None:
        for event, run in itertools.groupby(changes, key=lambda change: change.event):
            if event is CacheEvent.PUBLISHED:
                self._writer.added([change.block_hash for change in run], tier)
            elif event is CacheEvent.EVICTED:
                self._writer.removed([change.block_hash for change in run], tier)


def _holdings(engine: Engine) -> list[tuple[BlockHash, Tier]]:
    """List all findable blocks, once per tier; copies, which the engine's thread does not disturb."""
    paged = [(block_hash, Tier.DEVICE) for block_hash in engine.cached_hashes()]
    return paged + [(block_hash, Tier.HOST) for block_hash in engine.host_hashes()]
