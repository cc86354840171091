"""Exports the workers as this router sees them, in Prometheus series that are read when scraped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from services.metric_families import ROUTER
from services.router.fleet import Workers
from services.router.routing import DecodeCandidate


class FleetCollector(Collector):
    """Sessions, members, and what the decode workers' last frames said of their load."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        workers = self._workers
        yield ROUTER.read("tandem:router_sessions_up", workers.num_sessions_up)
        known = ROUTER.family("tandem:router_workers_known")
        for role in ("prefill", "decode", "elastic"):
            known.add_metric([role], sum(record.role == role for record in workers.records))
        yield known
        roles = ROUTER.family("tandem:worker_role")
        for worker_id, role in workers.roles_now():
            roles.add_metric([worker_id, role], 1)
        yield roles
        decode, prefill = workers.decode_candidates(), workers.prefill_candidates()
        queued = ROUTER.family("tandem:router_queued_tokens")
        # An elastic worker stands among both, and counts where its prompts are its first work, or are not.
        by_role = [each.num_outstanding_tokens for each in prefill if each.bending.role != "decode"]
        queued.add_metric(["prefill"], sum(by_role))
        queued.add_metric(
            ["decode"], sum(each.num_waiting_tokens for each in decode if not each.bending.is_prefill_first)
        )
        yield queued
        usage = ROUTER.family("vllm:kv_cache_usage_perc")
        for model in sorted({name for worker in decode for name in worker.model_names}):
            usage.add_metric([model, "router"], _usage([worker for worker in decode if model in worker.model_names]))
        yield usage


def _usage(workers: Sequence[DecodeCandidate]) -> float:
    num_blocks = sum(worker.num_blocks for worker in workers)
    return 1 - sum(worker.num_free_blocks for worker in workers) / num_blocks if num_blocks else 0.0
