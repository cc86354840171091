"""The block protocol in Prometheus series, the same for workers and store nodes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore.exchange import ExchangeObserver
from kvstore.protocol import FetchCause, FetchResult, LeaseOutcome
from kvstore.transport import Transport
from services.exposition import READ_S, SPEED_BYTES_PER_S, STAGE_S


class ExchangeMetrics(ExchangeObserver):
    """The observer of a process's block exchange."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"tandem:{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"tandem:{name}", help, labels, buckets=buckets, registry=registry)

        self._read_s = histogram("transfer_seconds", "Time of one read of blocks from a peer, by lane.", READ_S, "lane")
        self._speed = histogram(
            "transfer_bytes_per_second",
            "Speed of one read; reads that run side by side share the lane.",
            SPEED_BYTES_PER_S,
            "lane",
        )
        self._read_bytes = counter("transfer_bytes", "Bytes of reads that have ended.", "lane", "outcome")
        self._digests_checked = counter("digests_checked", "Blocks whose payload digest was checked after a read.")
        self._digests_failed = counter(
            "digests_failed", "Blocks whose bytes were not those that their owner announced; none was used."
        )
        self._fetches = counter("fetches", "Transfers that we read, by outcome.", "outcome")
        self._leases = counter("leases", "Transfers that others read from us, by outcome.", "outcome")
        self._lent_blocks = counter("leased_blocks", "Blocks announced in these leases.", "outcome")
        self._lease_s = histogram("lease_seconds", "Life of a lease.", STAGE_S)
        self._refused_peers = counter("peers_refused", "Incompatible peers refused.")
        self._lost_peers = counter("peers_lost", "Block-protocol connections that ended.")
        self._transport_up = Gauge(
            "tandem:transport_up", "Whether blocks can travel over a transport.", ["transport"], registry=registry
        )
        for cause in ("ok", *(each.value for each in FetchCause)):
            self._fetches.labels(cause)
        for outcome in LeaseOutcome:
            self._leases.labels(outcome.value)
            self._lent_blocks.labels(outcome.value)

    def watch(self, transports: Sequence[Transport]) -> None:
        """Where to read from, at scrape time, whether transports work."""
        for transport in transports:
            self._transport_up.labels(transport.name).set_function(functools.partial(_is_up, transport))

    def peer_refused(self, peer: str, reason: str) -> None:
        self._refused_peers.inc()

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


def _is_up(transport: Transport) -> bool:
    return transport.problem() is None
