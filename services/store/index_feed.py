"""Tells the prefix index what a store node's tiers hold."""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.block import BlockHash
from kvstore.index import IndexWriter, Tier
from kvstore.store import StoreTier, TieredStore
from services.node import IndexMetrics

_INDEX_TIERS = {StoreTier.DRAM: Tier.STORE, StoreTier.DISK: Tier.DISK}


class StoreIndexFeed:
    """`changed` is the store's `on_change`; what is there at the start, and after the index forgot, is told anew."""

    def __init__(self, redis_url: str, worker_id: str, incarnation: str, lease_s: float, metrics: IndexMetrics) -> None:
        self._store: TieredStore | None = None
        self._writer = writer = IndexWriter(
            redis_url, worker_id, incarnation, self._contents, lease_s=lease_s, observer=metrics
        )
        metrics.watch_index(lambda: writer.connected, lambda: writer.num_pending)

    async def start(self, store: TieredStore) -> None:
        """Announce what the store has, and then what changes."""
        self._store = store
        await self._writer.start()

    async def close(self) -> None:
        await self._writer.close()

    def changed(self, block_hash: BlockHash, tier: StoreTier, is_present: bool) -> None:
        """A tier has gained or lost a block."""
        (self._writer.added if is_present else self._writer.removed)([block_hash], _INDEX_TIERS[tier])

    def state(self) -> dict[str, object]:
        return {"redis": self._writer.connection_state.value, "synced": self._writer.synced}

    def _contents(self) -> Iterator[tuple[BlockHash, Tier]]:
        assert self._store is not None, "asked for the contents before the start"
        return ((block_hash, _INDEX_TIERS[tier]) for block_hash, tier in self._store.contents())
