"""Tells the prefix index what a process's tiers hold: what both workers' and store nodes' feeds do alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstore.block import BlockHash
from kvstore.index import IndexWriter, Tier
from services.node.index_metrics import IndexMetrics


class IndexFeed:
    """`contents` lists all blocks, once per tier: asked for at the start, and whenever the index forgot us."""

    def __init__(
        self,
        redis_url: str,
        holder_id: str,
        incarnation: str,
        lease_s: float,
        contents: Callable[[], Iterable[tuple[BlockHash, Tier]]],
        metrics: IndexMetrics,
    ) -> None:
        self._writer = writer = IndexWriter(
            redis_url, holder_id, incarnation, contents, lease_s=lease_s, observer=metrics
        )
        metrics.watch_index(lambda: writer.connected, lambda: writer.num_pending)

    async def start(self) -> None:
        """Announce what is there, and from then on what changes."""
        await self._writer.start()

    async def close(self) -> None:
        await self._writer.close()

    def state(self) -> dict[str, object]:
        return {
            "redis": self._writer.connection_state.value,
            "synced": self._writer.synced,
            "num_pending": self._writer.num_pending,
        }
