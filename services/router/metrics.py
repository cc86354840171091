"""Counts for the router what docs/metrics.md lists.

Request series have vLLM's names, for its dashboards and scalers; what only we have begins with `tandem:`. They say as
clients see it what workers export as they see it (label `role`). Durations come from a request's timeline alone.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest

from services.exposition import ExposedRegistry, add_process_series
from services.lifecycle import Event
from services.metric_families import ROUTER
from services.router.receipt import Receipt
from services.router.receipt_metrics import ReceiptMetrics

_ROLE = "router"
_FINISH_REASONS = ("stop", "length", "abort", "error")
REFUSALS = (
    "queue_full", "tokenizer_full", "workers_full", "no_worker", "not_connected", "draining", "all_tried",
)  # fmt: skip
"""Why a request is not taken on: our own queues, the workers', or no worker to take it (`routing.Refusal`)."""


class ModelMetrics:
    """The series of one model, their labels bound."""

    def __init__(self, metrics: RouterMetrics, model: str) -> None:
        self.time_to_first_token = metrics.time_to_first_token.labels(model, _ROLE)
        self.inter_token_latency = metrics.inter_token_latency.labels(model, _ROLE)
        self.e2e_request_latency = metrics.e2e_request_latency.labels(model, _ROLE)
        self.prompt_tokens = metrics.prompt_tokens.labels(model, _ROLE)
        self.generation_tokens = metrics.generation_tokens.labels(model, _ROLE)
        self.request_prompt_tokens = metrics.request_prompt_tokens.labels(model, _ROLE)
        self.request_generation_tokens = metrics.request_generation_tokens.labels(model, _ROLE)
        self.num_running = metrics.num_running.labels(model, _ROLE)
        self.num_waiting = metrics.num_waiting.labels(model, _ROLE)
        self._success = metrics.success
        self._model = model
        self._queue_time = metrics.request_queue_time.labels(model, _ROLE)
        self._prefill_time = metrics.request_prefill_time.labels(model, _ROLE)
        self._decode_time = metrics.request_decode_time.labels(model, _ROLE)
        self._time_per_output_token = metrics.request_time_per_output_token.labels(model, _ROLE)
        self._receipts = metrics.receipts
        self._prefix_queries = metrics.prefix_queries.labels(model, _ROLE)
        self._prefix_hits = metrics.prefix_hits.labels(model, _ROLE)
        for reason in _FINISH_REASONS:
            metrics.success.labels(model, _ROLE, reason)

    def count_finished(self, finished_reason: str) -> None:
        """One sequence ended: stop, length, abort or error."""
        self._success.labels(self._model, _ROLE, finished_reason).inc()

    def count_receipt(self, receipt: Receipt) -> None:
        """Adds a receipt to the counters that receipts add up to, and its stages to the histograms."""
        self._receipts.add(receipt)
        self._prefix_queries.inc(receipt.num_prompt_tokens)
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
        self._make_request_series()
        self.receipts = ReceiptMetrics(self.registry)

        self._requests = ROUTER.counter("tandem:router_requests", self.registry)
        self._errors = ROUTER.counter("tandem:router_errors", self.registry)
        self._refusals = ROUTER.counter("tandem:router_refusals", self.registry)
        self._retries = ROUTER.counter("tandem:router_retries", self.registry)
        self._disconnects = ROUTER.counter("tandem:router_client_disconnects", self.registry)
        self._decisions = ROUTER.counter("tandem:router_decisions", self.registry)
        self._lookups = ROUTER.counter("tandem:router_index_lookups", self.registry)
        self._lookup_time = ROUTER.histogram("tandem:router_index_lookup_seconds", self.registry)
        self._index_up = ROUTER.gauge("tandem:router_index_up", self.registry)
        self._registry_up = ROUTER.gauge("tandem:router_registry_up", self.registry)
        for reason in REFUSALS:
            self._refusals.labels(reason)
        for outcome in ("found", "nothing", "no_answer"):
            self._lookups.labels(outcome)
        self._models: dict[str, ModelMetrics] = {}

    def _make_request_series(self) -> None:
        self.time_to_first_token = ROUTER.histogram("vllm:time_to_first_token_seconds", self.registry)
        self.inter_token_latency = ROUTER.histogram("vllm:inter_token_latency_seconds", self.registry)
        self.request_time_per_output_token = ROUTER.histogram(
            "vllm:request_time_per_output_token_seconds", self.registry
        )
        self.e2e_request_latency = ROUTER.histogram("vllm:e2e_request_latency_seconds", self.registry)
        self.request_queue_time = ROUTER.histogram("vllm:request_queue_time_seconds", self.registry)
        self.request_prefill_time = ROUTER.histogram("vllm:request_prefill_time_seconds", self.registry)
        self.request_decode_time = ROUTER.histogram("vllm:request_decode_time_seconds", self.registry)
        self.request_prompt_tokens = ROUTER.histogram("vllm:request_prompt_tokens", self.registry)
        self.request_generation_tokens = ROUTER.histogram("vllm:request_generation_tokens", self.registry)
        self.prompt_tokens = ROUTER.counter("vllm:prompt_tokens", self.registry)
        self.generation_tokens = ROUTER.counter("vllm:generation_tokens", self.registry)
        self.prefix_queries = ROUTER.counter("vllm:prefix_cache_queries", self.registry)
        self.prefix_hits = ROUTER.counter("vllm:prefix_cache_hits", self.registry)
        self.success = ROUTER.counter("vllm:request_success", self.registry)
        self.num_running = ROUTER.gauge("vllm:num_requests_running", self.registry)
        self.num_waiting = ROUTER.gauge("vllm:num_requests_waiting", self.registry)

    def for_model(self, model: str) -> ModelMetrics:
        """`model` is a served name, never what a client wrote: the number of series stays small."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def count_request(self, endpoint: str, status: int) -> None:
        """An HTTP request has ended. `endpoint` is one of ours, never what a client wrote; `status` is how it went in
        the end, which for a stream that broke is not what its head says."""
        self._requests.labels(endpoint, str(status)).inc()

    def count_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def count_error(self, status: int) -> None:
        self._errors.labels(str(status)).inc()

    def count_retry(self) -> None:
        self._retries.inc()

    def count_disconnect(self) -> None:
        self._disconnects.inc()

    def count_decision(self, policy: str, reason: str, prefills_locally: bool) -> None:
        """Workers were chosen; `reason` is `Decision.cause`."""
        self._decisions.labels(policy, reason, "decode" if prefills_locally else "prefill").inc()

    def count_lookup(self, outcome: str, seconds: float) -> None:
        """`outcome`: found, nothing, or no_answer."""
        self._lookups.labels(outcome).inc()
        self._lookup_time.observe(seconds)

    def watch_index(self, is_up: Callable[[], bool]) -> None:
        """Registers where the index's state is read from, at scrape time."""
        self._index_up.set_function(is_up)

    def watch_registry(self, is_up: Callable[[], bool]) -> None:
        """Registers where the registry's state is read from, at scrape time."""
        self._registry_up.set_function(is_up)

    def exposition(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(ExposedRegistry(self.registry, {}))
