"""What the router counts; docs/metrics.md lists it all. vLLM's names for the request series, so that its dashboards and
scalers work, and `tandem:` for what only we have. Durations come from a request's timeline and from nothing else.

The request series repeat, as clients see them, what workers export as they see it: the label `role` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from services.exposition import INDEX_S, ITL_S, REQUEST_S, TOKENS, TTFT_S, ExposedRegistry, add_process_series
from services.lifecycle import Event
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

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tandem:router_{name}", text, labels, registry=self.registry)

        self._requests = counter("requests", "HTTP requests that ended, by endpoint and status.", "endpoint", "status")
        self._errors = counter("errors", "Error answers, by HTTP status.", "status")
        self._refusals = counter("refusals", "Requests not taken on, by reason.", "reason")
        self._retries = counter("retries", "Sequences given to another decode worker.")
        self._disconnects = counter("client_disconnects", "Requests that the client cut.")
        self._decisions = counter(
            "decisions", "Choices of workers, by what decided and by who is to prefill.", "policy", "reason", "prefill"
        )
        self._lookups = counter("index_lookups", "Questions to the prefix index.", "outcome")
        self._lookup_time = Histogram(
            "tandem:router_index_lookup_seconds", "How long they took.", registry=self.registry, buckets=INDEX_S
        )
        self._index_up = Gauge(
            "tandem:router_index_up",
            "Whether the prefix index answers; 0 also where there is none.",
            registry=self.registry,
        )
        self._registry_up = Gauge(
            "tandem:router_registry_up", "Whether the registry in Redis answers.", registry=self.registry
        )
        for reason in REFUSALS:
            self._refusals.labels(reason)
        for outcome in ("found", "nothing", "no_answer"):
            self._lookups.labels(outcome)
        self._models: dict[str, ModelMetrics] = {}

    def _make_request_series(self) -> None:
        by_model = ("model_name", "role")

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, by_model, registry=self.registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", text, (*by_model, *labels), registry=self.registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", TTFT_S
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between a request's outputs, per token.", ITL_S
        )
        self.request_time_per_output_token = histogram(
            "request_time_per_output_token_seconds", "Mean per token of a request after its first.", ITL_S
        )
        self.e2e_request_latency = histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last token.", REQUEST_S
        )
        self.request_queue_time = histogram(
            "request_queue_time_seconds", "In the queue of the worker that prefills.", REQUEST_S
        )
        self.request_prefill_time = histogram(
            "request_prefill_time_seconds", "From the prompt's first chunk to its last.", REQUEST_S
        )
        self.request_decode_time = histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", REQUEST_S
        )
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens per sequence.", TOKENS)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens per sequence.", TOKENS
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were sent to workers.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens of sequences that ended regularly.")
        self.prefix_hits = counter("prefix_cache_hits", "Of these, reused or fetched instead of computed.")
        self.success = counter("request_success", "Sequences that ended, by reason.", "finished_reason")
        self.num_running = Gauge(
            "vllm:num_requests_running", "Sequences that have had a token.", by_model, registry=self.registry
        )
        self.num_waiting = Gauge(
            "vllm:num_requests_waiting",
            "Sequences without a token yet, those that wait in the router too.",
            by_model,
            registry=self.registry,
        )

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
        """Where to read the index's state from, at scrape time."""
        self._index_up.set_function(is_up)

    def watch_registry(self, is_up: Callable[[], bool]) -> None:
        """Where to read the registry's state from, at scrape time."""
        self._registry_up.set_function(is_up)

    def exposition(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(ExposedRegistry(self.registry, {}))
