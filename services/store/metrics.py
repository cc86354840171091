"""Exports a store node's Prometheus series. The node's own counts are read when scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from kvstore.store import StoreNode
from services.exposition import ExposedRegistry, add_process_series
from services.metric_families import STORE
from services.node import ExchangeMetrics, IndexMetrics, ProgressMetrics


class StoreMetrics:
    """Owns the process's series."""

    def __init__(self) -> None:
        self._own = CollectorRegistry()
        add_process_series(self._own, "store")
        self.registry: CollectorRegistry = ExposedRegistry(self._own, {"role": "store"})
        self.exchange = ExchangeMetrics(self._own)
        self.index = IndexMetrics(self._own)
        self.progress = ProgressMetrics(self._own)

    def watch(self, node: StoreNode) -> None:
        """Read the node's own figures at each scrape from now on."""
        self._own.register(_NodeCollector(node))


class _NodeCollector(Collector):
    """The node's tiers and its intake."""

    def __init__(self, node: StoreNode) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        node, store = self._node, self._node.store
        intake = node.intake.stats
        blocks = STORE.family("tandem:store_blocks")
        blocks.add_metric(["dram"], len(store.dram))
        queries = STORE.family("tandem:store_queries")
        num_hits = store.stats.num_dram_hits + store.stats.num_disk_hits
        queries.add_metric(["dram"], store.stats.num_dram_hits)
        queries.add_metric(["disk"], store.stats.num_disk_hits)
        queries.add_metric(["none"], store.stats.num_queried - num_hits)
        corrupt = STORE.family("tandem:store_corrupt_blocks")
        corrupt.add_metric(["dram"], node.lender.num_corrupt)
        if store.disk is not None:
            blocks.add_metric(["disk"], len(store.disk))
            yield STORE.read("tandem:store_disk_bytes", store.disk.size_bytes)
            yield STORE.read("tandem:store_disk_paused", store.disk.is_paused)
            corrupt.add_metric(["disk"], store.disk.stats.num_corrupt)
            yield STORE.read("tandem:store_lost_blocks", store.stats.num_lost)
        yield blocks
        yield queries
        yield corrupt
        yield STORE.read("tandem:store_refuted_blocks", node.lender.num_refuted)
        yield STORE.read("tandem:store_doubted_blocks", node.lender.num_kept)
        yield STORE.read("tandem:store_slots", store.dram.num_slots)
        yield STORE.read("tandem:store_lent_blocks", node.lender.num_lent)
        yield STORE.read("tandem:store_offers_queued", node.intake.num_queued)
        yield STORE.read("tandem:store_evicted_blocks", store.dram.stats.num_evictions)
        yield STORE.read("tandem:store_pulled_blocks", intake.num_pulled_blocks)
        yield STORE.read("tandem:store_pulled_bytes", intake.num_pulled_bytes)
        offers = STORE.family("tandem:store_offers")
        offers.add_metric(["received"], intake.num_offers)
        offers.add_metric(["known"], intake.num_offers_known)
        offers.add_metric(["dropped"], intake.num_offers_dropped)
        offers.add_metric(["orphaned"], intake.num_orphans)
        for cause, count in intake.failures.items():
            offers.add_metric([cause], count)
        yield offers
