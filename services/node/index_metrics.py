"""What a process tells the prefix index, in Prometheus series; and whether it reaches the registry."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore.index import IndexObserver, ResyncReason
from services.exposition import INDEX_S


class IndexMetrics(IndexObserver):
    """The observer of a process's `IndexWriter`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._write_s = Histogram(
            "tandem:index_write_seconds",
            "Time that the prefix index took for one batch of changes.",
            buckets=INDEX_S,
            registry=registry,
        )
        self._written = Counter("tandem:index_written_blocks", "Blocks in these batches.", registry=registry)
        self._refused = Counter(
            "tandem:index_refused_blocks", "Blocks that the index had no room for.", registry=registry
        )
        self._resyncs = Counter(
            "tandem:index_resyncs", "Times that all blocks were announced anew.", ["reason"], registry=registry
        )
        self._pending = Gauge(
            "tandem:index_pending_blocks", "Changes that wait to be written to the index.", registry=registry
        )
        self._index_up = Gauge("tandem:index_up", "Whether the prefix index takes our changes.", registry=registry)
        self._registry_up = Gauge(
            "tandem:registry_up", "Whether the registry in Redis answers this process.", registry=registry
        )
        for reason in ResyncReason:
            self._resyncs.labels(reason.value)

    def watch_index(self, is_connected: Callable[[], bool], num_pending: Callable[[], int]) -> None:
        """Where to read the writer's state from, at scrape time."""
        self._index_up.set_function(is_connected)
        self._pending.set_function(num_pending)

    def watch_registry(self, is_connected: Callable[[], bool]) -> None:
        """Where to read the registrar's state from, at scrape time."""
        self._registry_up.set_function(is_connected)

    def batch_written(self, num_blocks: int, num_refused: int, duration_s: float) -> None:
        self._write_s.observe(duration_s)
        self._written.inc(num_blocks)
        self._refused.inc(num_refused)

    def resync_started(self, reason: ResyncReason) -> None:
        self._resyncs.labels(reason.value).inc()
