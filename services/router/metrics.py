"""Counts for the router what docs/metrics.md lists.

Request series have vLLM's names, for its dashboards and scalers; what only we have begins with `tandem:`. They say as
clients see it what workers export as they see it (label `role`). Durations come from a request's timeline alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from services.activity import recent_handoffs
from services.budgets import Objectives, Role
from services.exposition import ExposedRegistry, add_process_series
from services.http_server import CUTS
from services.lifecycle import Event
from services.metric_families import REQUESTS, ROUTER
from services.rates import TIERS
from services.router.finished import Finished
from services.router.processes import Family, Merge, Sample, Snapshot
from services.router.receipt import Receipt, Resume

_ROLE = "router"
_FINISH_REASONS = ("stop", "length", "abort", "error")
REFUSALS = (
    "queue_full", "ttft_deadline", "quota", "tokenizer_full", "memory_full", "workers_full",
    "no_worker", "not_connected", "draining", "all_tried", "too_short",
)  # fmt: skip
"""Why a request is not taken on: our own queues, the workers', or no worker to take it (`routing.Refusal`)."""
_OF_RECEIPTS: dict[str, Callable[[Receipt], float]] = {
    "tandem:router_receipts": lambda receipt: 1,
    "tandem:router_cached_tokens": lambda receipt: receipt.num_cached_tokens,
    "tandem:router_handoff_blocks": lambda receipt: receipt.usage.num_transferred_blocks,
    "tandem:router_handoff_bytes": lambda receipt: receipt.usage.num_transferred_bytes,
    "tandem:router_digests_checked": lambda receipt: receipt.num_digests_checked,
    "tandem:router_recomputes": lambda receipt: receipt.usage.num_recomputes,
}
"""Counters fed from receipts and from nothing else, so that both always add up."""

_OF_PROCESS: Final[Mapping[str, Merge]] = {
    "process_max_fds": "min",
    "process_start_time_seconds": "min",
    "tandem:build": "max",
}
"""How prometheus-client's own gauges are joined over a router's processes; the others are added up."""

_DIRECTIONS = {"prompt": "decode", "answer": "prefill"}
"""The role of the worker that does what another one's role is, by what it does (`routing.Deflection`)."""

_NO_OBJECTIVES = Objectives()
_RESUMED_TOKENS = ("recomputed", "reused", "fetched", "moved")


class ModelMetrics:
    """The series of one model, their labels bound."""

    def __init__(self, metrics: RouterMetrics, model: str) -> None:
        def counter(name: str) -> Counter:
            return metrics.request_counters[name].labels(model, _ROLE)

        def gauge(name: str) -> Gauge:
            return metrics.request_gauges[name].labels(model, _ROLE)

        def histogram(name: str) -> Histogram:
            return metrics.request_histograms[name].labels(model, _ROLE)

        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds")
        self.inter_token_latency = histogram("vllm:inter_token_latency_seconds")
        self.e2e_request_latency = histogram("vllm:e2e_request_latency_seconds")
        self.prompt_tokens = counter("vllm:prompt_tokens")
        self.generation_tokens = counter("vllm:generation_tokens")
        self.request_prompt_tokens = histogram("vllm:request_prompt_tokens")
        self.request_generation_tokens = histogram("vllm:request_generation_tokens")
        self.num_running = gauge("vllm:num_requests_running")
        self.num_waiting = gauge("vllm:num_requests_waiting")
        self._queue_time = histogram("vllm:request_queue_time_seconds")
        self._prefill_time = histogram("vllm:request_prefill_time_seconds")
        self._decode_time = histogram("vllm:request_decode_time_seconds")
        self._time_per_output_token = histogram("vllm:request_time_per_output_token_seconds")
        self._prefix_queries = counter("vllm:prefix_cache_queries")
        self._prefix_hits = counter("vllm:prefix_cache_hits")
        success = metrics.request_counters["vllm:request_success"]
        self._success = {reason: success.labels(model, _ROLE, reason) for reason in _FINISH_REASONS}
        self._count_receipt = metrics.count_receipt

    def count_finished(self, finished_reason: str) -> None:
        """Count the end of one sequence: stop, length, abort or error."""
        self._success[finished_reason].inc()

    def count_receipt(self, receipt: Receipt) -> None:
        """Adds a receipt to the counters that receipts add up to, and its stages to the histograms."""
        self._count_receipt(receipt)
        self._prefix_queries.inc(receipt.usage.num_prompt_tokens)
        self._prefix_hits.inc(receipt.num_cached_tokens)
        queue_s = receipt.seconds_between(Event.PREFILL_QUEUED, Event.PREFILL_SCHEDULED)
        prefill_s = receipt.seconds_between(Event.PREFILL_SCHEDULED, Event.PREFILL_FINISHED)
        decode_s = receipt.seconds_between(Event.FIRST_TOKEN, Event.FINISHED)
        if queue_s is not None:
            self._queue_time.observe(queue_s)
        if prefill_s is not None:
            self._prefill_time.observe(prefill_s)
        if decode_s is not None:
            self._decode_time.observe(decode_s)
            if receipt.num_generated_tokens > 1:
                self._time_per_output_token.observe(decode_s / (receipt.num_generated_tokens - 1))


class RouterMetrics:
    """All series of one router, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        add_process_series(self.registry, _ROLE)
        self.request_counters = {name: REQUESTS.counter(name, self.registry) for name in REQUESTS.of_type("counter")}
        self.request_gauges = {name: REQUESTS.gauge(name, self.registry) for name in REQUESTS.of_type("gauge")}
        self.request_histograms = {
            name: REQUESTS.histogram(name, self.registry) for name in REQUESTS.of_type("histogram")
        }
        self._of_receipts = {name: ROUTER.counter(name, self.registry) for name in _OF_RECEIPTS}
        prompt_tokens = ROUTER.counter("tandem:router_receipt_prompt_tokens", self.registry)
        self._computed, self._reused, self._fetched = map(prompt_tokens.labels, ("computed", "reused", "fetched"))
        self._fetched_blocks = ROUTER.counter("tandem:router_fetched_blocks", self.registry)
        self._fetched_bytes = ROUTER.counter("tandem:router_fetched_bytes", self.registry)

        self._requests = ROUTER.counter("tandem:router_requests", self.registry)
        self._errors = ROUTER.counter("tandem:router_errors", self.registry)
        self._refusals = ROUTER.counter("tandem:router_refusals", self.registry, REFUSALS)
        self.retries = ROUTER.counter("tandem:router_retries", self.registry)
        self._cuts = ROUTER.counter("tandem:router_cut_connections", self.registry, CUTS)
        self._resumes = ROUTER.counter("tandem:router_resumes", self.registry)
        for reason in ("lost", "given_up", "moved"):
            self._resumes.labels(reason, "resumed")
        self._resume_pause = ROUTER.histogram("tandem:router_resume_pause_seconds", self.registry)
        self._resumed_tokens = ROUTER.counter("tandem:router_resumed_tokens", self.registry, _RESUMED_TOKENS)
        self.disconnects = ROUTER.counter("tandem:router_client_disconnects", self.registry)
        self._decisions = ROUTER.counter("tandem:router_decisions", self.registry)
        self._deflections = ROUTER.counter("tandem:router_deflections", self.registry, tuple(_DIRECTIONS.values()))
        redirects = ROUTER.counter("tandem:router_redirects", self.registry, tuple(_DIRECTIONS.values()))
        self.count_redirect: Callable[[str], None] = lambda direction: redirects.labels(direction).inc()
        self._lookups = ROUTER.counter("tandem:router_index_lookups", self.registry, ("found", "nothing", "no_answer"))
        self._lookup_time = ROUTER.histogram("tandem:router_index_lookup_seconds", self.registry)
        self.index_up = ROUTER.gauge("tandem:router_index_up", self.registry)
        self.quotas_shared = ROUTER.gauge("tandem:router_quotas_shared", self.registry)
        self._objectives_met = ROUTER.counter("tandem:requests_objective_met", self.registry)
        self.controller_leader = ROUTER.gauge("tandem:controller_leader", self.registry)
        self._flips = ROUTER.counter("tandem:controller_flips", self.registry, get_args(Role))
        self.registry_up = ROUTER.gauge("tandem:router_registry_up", self.registry)
        self._models: dict[str, ModelMetrics] = {}
        self.handoffs_s = recent_handoffs()

    def for_model(self, model: str) -> ModelMetrics:
        """`model` is a served name, never what a client wrote: the number of series stays small."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def count_request(self, endpoint: str, status: int) -> None:
        """Count an HTTP request. `endpoint` is one of ours; `status` is its end, not a broken stream's head."""
        self._requests.labels(endpoint, str(status)).inc()

    def count_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def count_cut(self, why: str) -> None:
        """Count a connection that we ended: one of `CUTS`."""
        self._cuts.labels(why).inc()

    def count_error(self, status: int) -> None:
        self._errors.labels(str(status)).inc()

    def count_receipt(self, receipt: Receipt) -> None:
        for name, value_of in _OF_RECEIPTS.items():
            self._of_receipts[name].inc(value_of(receipt))
        handoff_s = receipt.seconds_between(Event.PREFILL_FINISHED, Event.DECODE_JOINED)
        if handoff_s is not None and receipt.usage.num_transferred_blocks:
            self.handoffs_s.append(handoff_s)
        self._computed.inc(receipt.num_computed_tokens)
        self._reused.inc(receipt.num_reused_tokens)
        self._fetched.inc(receipt.num_fetched_tokens)
        for part in receipt.usage.fetched:
            # The word is the worker's; an unknown one must not become a series.
            tier = part.tier if part.tier in TIERS else "other"
            self._fetched_blocks.labels(tier).inc(part.num_blocks)
            self._fetched_bytes.labels(tier).inc(part.num_bytes)

    def count_resume(self, resume: Resume, outcome: str = "resumed") -> None:
        """A pause in a sequence has ended: by its next token, or as `outcome` says."""
        self._resumes.labels(resume.reason, outcome).inc()
        if resume.pause_s is not None:
            self._resume_pause.observe(resume.pause_s)
            self._resumed_tokens.labels("recomputed").inc(resume.num_recomputed_tokens)
            self._resumed_tokens.labels("fetched").inc(resume.num_fetched_tokens)
            self._resumed_tokens.labels("reused").inc(resume.num_reused_tokens)
            self._resumed_tokens.labels("moved").inc(resume.num_moved_tokens)

    def count_decision(self, policy: str, reason: str, prefills_locally: bool, deflected: str) -> None:
        """Workers were chosen; `reason` is `Decision.cause`, `deflected` that of the decision."""
        if deflected:
            self._deflections.labels(_DIRECTIONS[deflected]).inc()
        self._decisions.labels(policy, reason, "decode" if prefills_locally else "prefill").inc()

    def count_objectives(self, finished: Finished) -> None:
        """A sequence has ended. What it had no objective for is not counted."""
        objectives, counter = finished.objectives, self._objectives_met
        is_error = finished.finish_reason == "error"
        for name, limit_s, seconds in (
            ("ttft", objectives.ttft_s, finished.ttft_s),
            ("tpot", objectives.tpot_s, finished.tpot_s or 0.0),
        ):
            if limit_s < math.inf:
                is_met = not is_error and seconds is not None and seconds <= limit_s
                counter.labels(finished.model, name, str(is_met).lower()).inc()
        if objectives != _NO_OBJECTIVES:
            counter.labels(finished.model, "both", str(finished.is_good).lower()).inc()

    def count_flip(self, role: Role) -> None:
        """A worker was told that role."""
        self._flips.labels(role).inc()

    def count_lookup(self, outcome: str, seconds: float) -> None:
        """`outcome`: found, nothing, or no_answer."""
        self._lookups.labels(outcome).inc()
        self._lookup_time.observe(seconds)

    def exposition(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(ExposedRegistry(self.registry, {}))

    def snapshot(self) -> Snapshot:
        """The same, to be added up with other processes'."""
        return Snapshot(
            [
                Family(
                    family.name,
                    family.documentation,
                    family.type,
                    family.unit,
                    ROUTER[family.name].over_processes
                    if family.name in ROUTER
                    else _OF_PROCESS.get(family.name, "sum"),
                    [Sample(sample.name, sample.labels, sample.value) for sample in family.samples],
                )
                for family in ExposedRegistry(self.registry, {}).collect()
            ]
        )


def text_of(snapshot: Snapshot) -> bytes:
    """As `RouterMetrics.exposition`, of what several processes have said."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Shown(snapshot))
    return generate_latest(registry)


class _Shown(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        for family in self._snapshot.families:
            metric = Metric(family.name, family.documentation, family.type, family.unit)
            for sample in family.samples:
                metric.add_sample(sample.name, sample.labels, sample.value)
            yield metric
