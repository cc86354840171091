"""A store node's Prometheus series. What the node counts itself is read when scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.store import StoreNode
from services.exposition import (
    ExposedRegistry,
    add_process_series,
    counter,
    gauge,
)
from services.node import ExchangeMetrics, IndexMetrics


class StoreMetrics:
    """Owns the process's series."""

    def __init__(self) -> None:
        self._own = CollectorRegistry()
        add_process_series(self._own, "store")
        self.registry: CollectorRegistry = ExposedRegistry(self._own, {"role": "store"})
        self.exchange = ExchangeMetrics(self._own)
        self.index = IndexMetrics(self._own)

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
        blocks = GaugeMetricFamily("tandem:store_blocks", "Blocks kept, by tier.", labels=["tier"])
        blocks.add_metric(["dram"], len(store.dram))
        queries = CounterMetricFamily("tandem:store_queries", "Blocks asked for, by where they were.", labels=["tier"])
        num_hits = store.stats.num_dram_hits + store.stats.num_disk_hits
        queries.add_metric(["dram"], store.stats.num_dram_hits)
        queries.add_metric(["disk"], store.stats.num_disk_hits)
        queries.add_metric(["none"], store.stats.num_queried - num_hits)
        corrupt = CounterMetricFamily("tandem:store_corrupt_blocks", "Blocks whose bytes had changed.", labels=["tier"])
        corrupt.add_metric(["dram"], node.lender.num_corrupt)
        if store.disk is not None:
            blocks.add_metric(["disk"], len(store.disk))
            yield gauge("tandem:store_disk_bytes", "Bytes of disk taken.", store.disk.size_bytes)
            yield gauge("tandem:store_disk_paused", "Whether the disk refused the last write.", store.disk.is_paused)
            corrupt.add_metric(["disk"], store.disk.stats.num_corrupt)
            yield counter("tandem:store_lost_blocks", "Evicted, and not taken by the disk.", store.stats.num_lost)
        yield blocks
        yield queries
        yield corrupt
        yield gauge("tandem:store_slots", "Blocks that the memory can hold.", store.dram.num_slots)
        yield gauge("tandem:store_lent_blocks", "Blocks lent at present.", node.lender.num_lent)
        yield gauge("tandem:store_offers_queued", "Offers that wait.", node.intake.num_queued)
        yield counter("tandem:store_evicted_blocks", "Blocks evicted from memory.", store.dram.stats.num_evictions)
        yield counter("tandem:store_pulled_blocks", "Blocks taken over from workers.", intake.num_pulled_blocks)
        yield counter("tandem:store_pulled_bytes", "Bytes of these.", intake.num_pulled_bytes)
        offers = CounterMetricFamily(
            "tandem:store_offers", "Offers of workers, by what came of them.", labels=["outcome"]
        )
        offers.add_metric(["received"], intake.num_offers)
        offers.add_metric(["known"], intake.num_offers_known)
        offers.add_metric(["dropped"], intake.num_offers_dropped)
        offers.add_metric(["orphaned"], intake.num_orphans)
        for cause, count in intake.failures.items():
            offers.add_metric([cause], count)
        yield offers
