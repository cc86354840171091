"""What the router counts. The names of vLLM for the request series, so that its dashboards and scalers work unchanged,
and `tandem:` for what only we have. Durations come from a request's timeline and from nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from services.lifecycle import Event
from services.router.cost import TIERS
from services.router.receipt import Receipt

# vLLM's bucket edges.
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_E2E_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_INDEX_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_TOKENS = tuple(mantissa * 10**exponent for exponent in range(7) for mantissa in (1, 2, 5))


class ModelMetrics:
    """The series of one model, their labels bound."""

    def __init__(self, metrics: RouterMetrics, model: str) -> None:
        self.time_to_first_token = metrics.time_to_first_token.labels(model)
        self.inter_token_latency = metrics.inter_token_latency.labels(model)
        self.e2e_request_latency = metrics.e2e_request_latency.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.generation_tokens = metrics.generation_tokens.labels(model)
        self.request_prompt_tokens = metrics.request_prompt_tokens.labels(model)
        self.request_generation_tokens = metrics.request_generation_tokens.labels(model)
        self.num_running = metrics.num_running.labels(model)
        self.num_waiting = metrics.num_waiting.labels(model)
        self._success = metrics.success
        self._model = model
        self._queue_time = metrics.request_queue_time.labels(model)
        self._prefill_time = metrics.request_prefill_time.labels(model)
        self._decode_time = metrics.request_decode_time.labels(model)
        self._time_per_output_token = metrics.request_time_per_output_token.labels(model)
        self._receipts = metrics.receipts

    def count_finished(self, finished_reason: str) -> None:
        """One sequence ended: stop, length, abort or error."""
        self._success.labels(self._model, finished_reason).inc()

    def count_receipt(self, receipt: Receipt) -> None:
        """Adds a receipt to the counters that receipts add up to, and its stages to the histograms."""
        self._receipts.add(receipt)
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


class ReceiptMetrics:
    """Counters that are fed from receipts and from nothing else: sums over all receipts of this router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tandem:router_{name}", text, labels, registry=registry)

        self._receipts = counter("receipts", "Sequences that ended regularly and whose worker said what they cost.")
        prompt_tokens = counter("receipt_prompt_tokens", "Prompt tokens, by where their KV came from.", "source")
        self._computed = prompt_tokens.labels("computed")
        self._reused = prompt_tokens.labels("reused")
        self._fetched = prompt_tokens.labels("fetched")
        self._cached = counter("cached_tokens", "Prompt tokens that were not computed: reused or fetched.")
        self._fetched_blocks = counter("fetched_blocks", "Prefix blocks pulled from other holders.", "tier")
        self._fetched_bytes = counter("fetched_bytes", "The same in bytes.", "tier")
        self._handoff_blocks = counter("handoff_blocks", "Blocks read from prefill workers.")
        self._handoff_bytes = counter("handoff_bytes", "The same in bytes.")
        self._digests = counter("digests_checked", "Blocks whose payload was checked before use.")
        self._recomputes = counter("recomputes", "Prompts computed again after a fault or a preemption.")

    def add(self, receipt: Receipt) -> None:
        self._receipts.inc()
        self._computed.inc(receipt.num_computed_tokens)
        self._reused.inc(receipt.num_reused_tokens)
        self._fetched.inc(receipt.num_fetched_tokens)
        self._cached.inc(receipt.num_cached_tokens)
        for part in receipt.fetched:
            # The word is the worker's; an unknown one must not become a series.
            tier = part.tier if part.tier in TIERS else "other"
            self._fetched_blocks.labels(tier).inc(part.num_blocks)
            self._fetched_bytes.labels(tier).inc(part.num_bytes)
        self._handoff_blocks.inc(receipt.num_handoff_blocks)
        self._handoff_bytes.inc(receipt.num_handoff_bytes)
        self._digests.inc(receipt.num_digests_checked)
        self._recomputes.inc(receipt.num_recomputes)


class RouterMetrics:
    """All series of one router, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_model = ("model_name",)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, by_model, registry=self.registry, buckets=buckets)

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "From the request's arrival to its first token.", _TTFT_S
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "Between a request's outputs, per token.", _ITL_S
        )
        self.e2e_request_latency = histogram(
            "vllm:e2e_request_latency_seconds", "From the request's arrival to its last token.", _E2E_S
        )
        self.request_queue_time = histogram(
            "vllm:request_queue_time_seconds", "In the queue of the worker that prefills.", _E2E_S
        )
        self.request_prefill_time = histogram(
            "vllm:request_prefill_time_seconds", "From the prompt's first chunk to its last.", _E2E_S
        )
        self.request_decode_time = histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _E2E_S
        )
        self.request_time_per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of a request's tokens after the first.", _ITL_S
        )
        self.receipts = ReceiptMetrics(self.registry)
        self.request_prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens per sequence.", _TOKENS)
        self.request_generation_tokens = histogram(
            "vllm:request_generation_tokens", "Generated tokens per sequence.", _TOKENS
        )
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens.", by_model, registry=self.registry)
        self.generation_tokens = Counter(
            "vllm:generation_tokens", "Generated tokens.", by_model, registry=self.registry
        )
        self.success = Counter(
            "vllm:request_success", "Sequences that ended.", ("model_name", "finished_reason"), registry=self.registry
        )
        self.num_running = Gauge(
            "vllm:num_requests_running", "Sequences that have had a token.", by_model, registry=self.registry
        )
        self.num_waiting = Gauge(
            "vllm:num_requests_waiting", "Sequences without a token yet.", by_model, registry=self.registry
        )
        self._refusals = Counter(
            "tandem:router_refusals", "Requests not taken on.", ("reason",), registry=self.registry
        )
        self._http_errors = Counter(
            "tandem:router_errors", "Error answers, by HTTP status.", ("status",), registry=self.registry
        )
        self._retries = Counter(
            "tandem:router_retries", "Sequences given to another decode worker.", registry=self.registry
        )
        self._disconnects = Counter(
            "tandem:router_client_disconnects", "Requests that the client cut.", registry=self.registry
        )
        self._sessions_up = Gauge(
            "tandem:router_sessions_up", "Decode workers with a live session.", registry=self.registry
        )
        self._workers_known = Gauge(
            "tandem:router_workers_known", "Workers in the registry.", ("role",), registry=self.registry
        )
        self._lookups = Counter(
            "tandem:router_index_lookups", "Questions to the prefix index.", ("outcome",), registry=self.registry
        )
        self._lookup_time = Histogram(
            "tandem:router_index_lookup_seconds", "How long they took.", registry=self.registry, buckets=_INDEX_S
        )
        self._index_up = Gauge(
            "tandem:router_index_up", "Whether the prefix index answers; 0 also where there is none.",
            registry=self.registry,
        )  # fmt: skip
        self._models: dict[str, ModelMetrics] = {}

    def for_model(self, model: str) -> ModelMetrics:
        """`model` is a served name, never what a client wrote: the number of series stays small."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def count_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def count_error(self, status: int) -> None:
        self._http_errors.labels(str(status)).inc()

    def count_retry(self) -> None:
        self._retries.inc()

    def count_disconnect(self) -> None:
        self._disconnects.inc()

    def count_lookup(self, outcome: str, seconds: float) -> None:
        """`outcome`: found, nothing, or no_answer."""
        self._lookups.labels(outcome).inc()
        self._lookup_time.observe(seconds)

    def watch_index(self, is_up: Callable[[], bool]) -> None:
        """Where to read the index's state from, at scrape time."""
        self._index_up.set_function(is_up)

    def watch_workers(self, num_sessions_up: Callable[[], int], num_known: Callable[[str], int]) -> None:
        """Where to read the gauges of the workers from, at scrape time. `num_known` takes the role."""
        self._sessions_up.set_function(num_sessions_up)
        for role in ("prefill", "decode"):
            self._workers_known.labels(role).set_function(functools.partial(num_known, role))

    def exposition(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)
