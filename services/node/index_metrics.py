"""Exports what a process tells the prefix index, and whether it reaches the registry."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from kvstore.index import IndexObserver, ResyncReason
from services.metric_families import NODE


class IndexMetrics(IndexObserver):
    """The observer of a process's `IndexWriter`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._write_s = NODE.histogram("tandem:index_write_seconds", registry)
        self._written = NODE.counter("tandem:index_written_blocks", registry)
        self._resyncs = NODE.counter("tandem:index_resyncs", registry, (each.value for each in ResyncReason))
        self._pending = NODE.gauge("tandem:index_pending_blocks", registry)
        self._index_up = NODE.gauge("tandem:index_up", registry)
        self._registry_up = NODE.gauge("tandem:registry_up", registry)

    def watch_index(self, is_connected: Callable[[], bool], num_pending: Callable[[], int]) -> None:
        """Register where to read the writer's state from, at scrape time."""
        self._index_up.set_function(is_connected)
        self._pending.set_function(num_pending)

    def watch_registry(self, is_connected: Callable[[], bool]) -> None:
        """Register where to read the registrar's state from, at scrape time."""
        self._registry_up.set_function(is_connected)

    def batch_written(self, num_blocks: int, duration_s: float) -> None:
        self._write_s.observe(duration_s)
        self._written.inc(num_blocks)

    def resync_started(self, reason: ResyncReason) -> None:
        self._resyncs.labels(reason.value).inc()
