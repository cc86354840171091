"""Exports the block protocol in Prometheus series, the same for workers and store nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from kvstore.exchange import ExchangeObserver
from kvstore.protocol import FetchCause, FetchResult, LeaseOutcome
from kvstore.transport import Transport
from services.metric_families import NODE


class ExchangeMetrics(ExchangeObserver):
    """The observer of a process's block exchange."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._read_s = NODE.histogram("tandem:transfer_seconds", registry)
        self._speed = NODE.histogram("tandem:transfer_bytes_per_second", registry)
        self._read_bytes = NODE.counter("tandem:transfer_bytes", registry)
        self._digests_checked = NODE.counter("tandem:digests_checked", registry)
        self._digests_failed = NODE.counter("tandem:digests_failed", registry)
        self._fetches = NODE.counter("tandem:fetches", registry, ["ok", *(each.value for each in FetchCause)])
        outcomes = [each.value for each in LeaseOutcome]
        self._leases = NODE.counter("tandem:leases", registry, outcomes)
        self._lent_blocks = NODE.counter("tandem:leased_blocks", registry, outcomes)
        self._lease_s = NODE.histogram("tandem:lease_seconds", registry)
        self._refused_peers = NODE.counter("tandem:peers_refused", registry)
        self._num_unproven = 0
        self._strangers = _Strangers({"kv": lambda: self._num_unproven})
        registry.register(self._strangers)
        self._lost_peers = NODE.counter("tandem:peers_lost", registry)
        self._transport_up = NODE.gauge("tandem:transport_up", registry)

    def watch(self, transports: Sequence[Transport]) -> None:
        """Register where to read, at scrape time, whether transports work."""
        for transport in transports:
            self._transport_up.labels(transport.name).set_function(functools.partial(_is_up, transport))

    def watch_port(self, name: str, num_strangers: Callable[[], int]) -> None:
        """Export from now on how often somebody without the secret was refused at another port of the process."""
        self._strangers.ports[name] = num_strangers

    def peer_refused(self, peer: str, reason: str) -> None:
        self._refused_peers.inc()

    def peer_unproven(self, address: str, reason: str) -> None:
        self._num_unproven += 1

    def peer_lost(self, peer_id: str, reason: str, we_read: bool) -> None:
        self._lost_peers.inc()

    def read_ended(self, peer_id: str, lane: str, num_blocks: int, num_bytes: int, duration_s: float, ok: bool) -> None:
        self._read_s.labels(lane).observe(duration_s)
        self._read_bytes.labels(lane, "ok" if ok else "failed").inc(num_bytes)
        if ok and duration_s > 0:
            self._speed.labels(lane).observe(num_bytes / duration_s)

    def digests_checked(self, peer_id: str, num_blocks: int) -> None:
        self._digests_checked.inc(num_blocks)

    def fetch_ended(self, peer_id: str, result: FetchResult, duration_s: float) -> None:
        self._fetches.labels("ok" if result.failure is None else result.failure.cause.value).inc()
        if result.failure is not None and result.failure.cause is FetchCause.DIGEST_MISMATCH:
            # A fetch ends with the first block that fails.
            self._digests_failed.inc()

    def lease_ended(self, peer_id: str, outcome: LeaseOutcome, num_blocks: int, duration_s: float) -> None:
        self._leases.labels(outcome.value).inc()
        self._lent_blocks.labels(outcome.value).inc(num_blocks)
        self._lease_s.observe(duration_s)


class _Strangers(Collector):
    """Counts that were kept before there was a registry."""

    def __init__(self, ports: dict[str, Callable[[], int]]) -> None:
        self.ports = ports

    def collect(self) -> Iterable[Metric]:
        family = NODE.family("tandem:peers_unproven")
        for name, num_strangers in self.ports.items():
            family.add_metric([name], num_strangers())
        yield family


def _is_up(transport: Transport) -> bool:
    return transport.problem() is None
