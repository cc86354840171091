"""Tells the prefix index what a store node's tiers hold."""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.block import BlockHash
from kvstore.index import Tier
from kvstore.store import StoreTier, TieredStore
from services.node import IndexFeed, IndexMetrics

_INDEX_TIERS = {StoreTier.DRAM: Tier.STORE, StoreTier.DISK: Tier.DISK}


class StoreIndexFeed(IndexFeed):
    """A store node's `IndexFeed`. `changed` is the store's `on_change`; `watch` comes before `start`."""

    def __init__(self, redis_url: str, worker_id: str, incarnation: str, lease_s: float, metrics: IndexMetrics) -> None:
        super().__init__(redis_url, worker_id, incarnation, lease_s, self._contents, metrics)
        self._store: TieredStore | None = None

    def watch(self, store: TieredStore) -> None:
        """Announce this store's blocks."""
        self._store = store

    def changed(self, block_hash: BlockHash, tier: StoreTier, is_present: bool) -> None:
        """A tier has gained or lost a block."""
        (self._writer.added if is_present else self._writer.removed)([block_hash], _INDEX_TIERS[tier])

    def _contents(self) -> Iterator[tuple[BlockHash, Tier]]:
        assert self._store is not None, "asked for the contents before the start"
        return ((block_hash, _INDEX_TIERS[tier]) for block_hash, tier in self._store.contents())
