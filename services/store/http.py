"""Serves a store node's HTTP port, open from start to end, even before the first worker has come.

`/health` (liveness) says that the process can move blocks, `/ready` (readiness) whether it lends them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.store import StoreNode
from services.node import DebugServer
from services.store.index_feed import StoreIndexFeed
from services.store.metrics import StoreMetrics


class StoreHttp:
    """Serves metrics, health and state of a node that may not be there yet."""

    def __init__(
        self, worker_id: str, metrics: StoreMetrics, tokens: Sequence[str] = (), open_metrics: bool = True
    ) -> None:
        """`tokens`, `open_metrics`: as `DebugServer`."""
        self.address = ""
        """`host:port` that we listen on."""
        self.not_ready = "starting"
        """Why the node does not lend blocks; empty when it does."""
        self.stuck = ""
        """What stands still; empty: nothing."""
        self._worker_id = worker_id
        self._node: StoreNode | None = None
        self._feed: StoreIndexFeed | None = None
        self._server = DebugServer(
            lambda: metrics.registry,
            state=self._state,
            check_integrity=self._check_integrity,
            unhealthy=self._unhealthy,
            not_ready=lambda: self.not_ready or (f"no progress of: {self.stuck}" if self.stuck else ""),
            tokens=tokens,
            open_metrics=open_metrics,
        )
        metrics.exchange.watch_port("http", lambda: self._server.num_strangers)

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one. Raises OSError."""
        self.address = await self._server.start(host, port)

    async def close(self) -> None:
        await self._server.close()

    def watch(self, node: StoreNode, feed: StoreIndexFeed) -> None:
        """Tell of this node from now on, after its end, too."""
        self._node, self._feed = node, feed

    def _state(self) -> dict[str, object]:
        why = {"not_ready": self.not_ready, "stuck": self.stuck}
        if self._node is None or self._feed is None:
            return {"worker_id": self._worker_id, "role": "store", **why}
        return self._node.state() | {"index": self._feed.state(), **why}

    def _unhealthy(self) -> str:
        return "" if self._node is None or self._node.exchange.can_move_blocks else "no transport works"

    async def _check_integrity(self) -> None:
        if self._node is not None:
            self._node.check_integrity()
