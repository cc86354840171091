"""A store node's Prometheus series. What the node counts itself is read when scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.fetch_events import FetchResult
from kvstore.lease import LeaseOutcome
from kvstore.observer import ExchangeObserver
from kvstore.store_node import StoreNode

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class StoreMetrics(ExchangeObserver):
    """Owns the process's registry; also the observer of the node's block exchange."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._leases = self._counter("tandem:leases", "Leases closed, by outcome.", "outcome")
        self._lent_blocks = self._counter("tandem:lent_blocks", "Blocks announced to readers.", "outcome")
        self._fetches = self._counter("tandem:fetches", "Fetches ended, by outcome.", "outcome")
        self._read_bytes = self._counter("tandem:transfer_bytes", "Bytes read from peers.", "lane", "outcome")
        self._digests = self._counter("tandem:digests_checked", "Blocks whose payload digest was checked.")
        self._refused_peers = self._counter("tandem:peers_refused", "Incompatible peers refused.")
        self._lost_peers = self._counter("tandem:peers_lost", "Block-protocol connections that ended.")
        self._lease_s = Histogram(
            "tandem:lease_seconds", "Life of a lease.", buckets=_BUCKETS_S, registry=self.registry
        )

    def watch(self, node: StoreNode) -> None:
        """Read the node's own figures at each scrape from now on."""
        self.registry.register(_NodeCollector(node))

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def peer_refused(self, peer: str, reason: str) -> None:
        self._refused_peers.inc()

    def peer_lost(self, peer_id: str, reason: str, we_read: bool) -> None:
        self._lost_peers.inc()

    def read_ended(self, peer_id: str, lane: str, num_blocks: int, num_bytes: int, duration_s: float, ok: bool) -> None:
        self._read_bytes.labels(lane, "ok" if ok else "failed").inc(num_bytes)

    def digests_checked(self, peer_id: str, num_blocks: int) -> None:
        self._digests.inc(num_blocks)

    def fetch_ended(self, peer_id: str, result: FetchResult, duration_s: float) -> None:
        self._fetches.labels("ok" if result.failure is None else result.failure.cause.value).inc()

    def lease_ended(self, peer_id: str, outcome: LeaseOutcome, num_blocks: int, duration_s: float) -> None:
        self._leases.labels(outcome.value).inc()
        self._lent_blocks.labels(outcome.value).inc(num_blocks)
        self._lease_s.observe(duration_s)


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
            yield _gauge("tandem:store_disk_bytes", "Bytes of disk taken.", store.disk.size_bytes)
            yield _gauge("tandem:store_disk_paused", "Whether the disk refused the last write.", store.disk.is_paused)
            corrupt.add_metric(["disk"], store.disk.stats.num_corrupt)
            yield _counter("tandem:store_lost_blocks", "Evicted, and not taken by the disk.", store.stats.num_lost)
        yield blocks
        yield queries
        yield corrupt
        yield _gauge("tandem:store_slots", "Blocks that the memory can hold.", store.dram.num_slots)
        yield _gauge("tandem:store_lent_blocks", "Blocks lent at present.", node.lender.num_lent)
        yield _gauge("tandem:store_offers_queued", "Offers that wait.", node.intake.num_queued)
        yield _counter("tandem:store_evicted_blocks", "Blocks evicted from memory.", store.dram.stats.num_evicted)
        yield _counter("tandem:store_pulled_blocks", "Blocks taken over from workers.", intake.num_pulled_blocks)
        yield _counter("tandem:store_pulled_bytes", "Bytes of these.", intake.num_pulled_bytes)
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


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(name, help, value=value)
