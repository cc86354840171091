"""The workers as this router sees them, in Prometheus series that are read when scraped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.exposition import gauge
from services.router.fleet import Workers
from services.router.routing import DecodeCandidate


class FleetCollector(Collector):
    """Sessions, members, and what the decode workers' last frames said of their load."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        workers = self._workers
        yield gauge("tandem:router_sessions_up", "Decode workers with a live session.", workers.num_sessions_up)
        known = GaugeMetricFamily("tandem:router_workers_known", "Workers in the registry.", labels=["role"])
        for role in ("prefill", "decode"):
            known.add_metric([role], sum(record.role == role for record in workers.records))
        yield known
        decode, prefill = workers.decode_candidates(), workers.prefill_candidates()
        queued = GaugeMetricFamily(
            "tandem:router_queued_tokens",
            "Prompt tokens sent to workers, without a token yet.",
            labels=["role"],
        )
        queued.add_metric(["prefill"], sum(worker.num_outstanding_tokens for worker in prefill))
        queued.add_metric(["decode"], sum(worker.num_waiting_tokens for worker in decode))
        yield queued
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc",
            "Share of the decode workers' KV blocks in use, by their last reports; 1 is all.",
            labels=["model_name", "role"],
        )
        for model in sorted({name for worker in decode for name in worker.model_names}):
            usage.add_metric([model, "router"], _usage([worker for worker in decode if model in worker.model_names]))
        yield usage


def _usage(workers: Sequence[DecodeCandidate]) -> float:
    num_blocks = sum(worker.num_blocks for worker in workers)
    return 1 - sum(worker.num_free_blocks for worker in workers) / num_blocks if num_blocks else 0.0
