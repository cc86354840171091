"""Exports a worker's Prometheus series from a registry of its own. docs/metrics.md lists them all.

Engine figures are read when scraped, all else is counted as it ends, requests from their timelines alone. Each is
counted by one worker: queue and prefill by whoever computed the prompt, the rest by the decode worker, its owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Histogram
from tandem.v1 import worker_pb2 as pb

from services.activity import recent_handoffs
from services.engine.api import Engine
from services.exposition import ExposedRegistry, add_process_series
from services.lifecycle import Event, Timeline
from services.metric_families import WORKER
from services.node import ExchangeMetrics, IndexMetrics, ProgressMetrics
from services.rates import TIERS
from services.worker.metrics.engine_metrics import EngineCollector, HostTierCollector, StepMetrics

# A stage is the time between two events of a request's timeline. Those of a handoff follow each other without a gap.
_HANDOFF_STAGES = {
    "order": (Event.PREFILL_ORDERED, Event.PREFILL_QUEUED),
    "prefill_queue": (Event.PREFILL_QUEUED, Event.PREFILL_SCHEDULED),
    "prefill": (Event.PREFILL_SCHEDULED, Event.PREFILL_FINISHED),
    "read": (Event.PREFILL_FINISHED, Event.BLOCKS_READ),
    "confirm": (Event.BLOCKS_READ, Event.HANDOFF_CONFIRMED),
    "join": (Event.HANDOFF_CONFIRMED, Event.DECODE_JOINED),
    "handoff": (Event.PREFILL_FINISHED, Event.DECODE_JOINED),
}
_STEP_ALIGNMENT = (Event.DECODE_JOINED, Event.FIRST_TOKEN)
_STAGES = {
    "first_token": (Event.RECEIVED, Event.FIRST_TOKEN),
    "decode": (Event.FIRST_TOKEN, Event.FINISHED),
    "total": (Event.RECEIVED, Event.FINISHED),
}
_REGULAR_ENDS = frozenset({pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH})
_FINISH_REASONS = ("stop", "length", "abort", "error", "moved")
_HANDOFF_FAILURES = ("unreachable", "timeout", "digest", "peer_lost", "rpc", "overloaded")

Refusal = Literal["draining", "full", "stuck", "invalid", "protocol"]
OrderOutcome = Literal["finished", "refused", "failed", "cancelled", "expired"]
RecomputeCause = Literal["handoff", "preemption", "move"]
RedirectGoal = Literal["elsewhere", "here"]
MoveOutcome = Literal["left", "joined", "recomputed"]


class RequestMetrics:
    """Counts requests as they pass."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.first_token_s = WORKER.histogram("vllm:time_to_first_token_seconds", registry)
        self.gap_s = WORKER.histogram("vllm:inter_token_latency_seconds", registry)
        self.token_s = WORKER.histogram("vllm:request_time_per_output_token_seconds", registry)
        self.total_s = WORKER.histogram("vllm:e2e_request_latency_seconds", registry)
        self.queue_s = WORKER.histogram("vllm:request_queue_time_seconds", registry)
        self.prefill_s = WORKER.histogram("vllm:request_prefill_time_seconds", registry)
        self.decode_s = WORKER.histogram("vllm:request_decode_time_seconds", registry)
        self.num_prompt_tokens = WORKER.histogram("vllm:request_prompt_tokens", registry)
        self.num_generated_tokens = WORKER.histogram("vllm:request_generation_tokens", registry)
        self.success = WORKER.counter("vllm:request_success", registry, _FINISH_REASONS)
        self.handoffs_s = recent_handoffs()
        self.stage_s = WORKER.histogram("tandem:request_stage_seconds", registry)
        for stage in (*_HANDOFF_STAGES, "step_alignment", *_STAGES):
            self.stage_s.labels(stage)

    def prefilled(self, timeline: Timeline) -> None:
        """A prompt was computed here."""
        _observe(self.queue_s, timeline.seconds_between(Event.PREFILL_QUEUED, Event.PREFILL_SCHEDULED))
        _observe(self.prefill_s, timeline.seconds_between(Event.PREFILL_SCHEDULED, Event.PREFILL_FINISHED))

    def finished(self, timeline: Timeline, usage: pb.Usage, finish_reason: pb.FinishReason) -> None:
        """A decode worker's request has ended."""
        self.success.labels(pb.FinishReason.Name(finish_reason).removeprefix("FINISH_REASON_").lower()).inc()
        for stage, events in _STAGES.items():
            _observe(self.stage_s.labels(stage), timeline.seconds_between(*events))
        if usage.prefilled_locally:
            self.prefilled(timeline)
        elif usage.num_transferred_blocks:
            for stage, events in _HANDOFF_STAGES.items():
                _observe(self.stage_s.labels(stage), timeline.seconds_between(*events))
            if usage.HasField("first_token_equal"):
                _observe(self.stage_s.labels("step_alignment"), timeline.seconds_between(*_STEP_ALIGNMENT))
            if (handoff_s := timeline.seconds_between(*_HANDOFF_STAGES["handoff"])) is not None:
                self.handoffs_s.append(handoff_s)
        if finish_reason not in _REGULAR_ENDS:
            return
        decode_s = timeline.seconds_between(Event.FIRST_TOKEN, Event.FINISHED)
        _observe(self.total_s, timeline.seconds_between(Event.RECEIVED, Event.FINISHED))
        _observe(self.decode_s, decode_s)
        if decode_s is not None and usage.num_generated_tokens > 1:
            _observe(self.token_s, decode_s / (usage.num_generated_tokens - 1))
        self.num_prompt_tokens.observe(usage.num_prompt_tokens)
        self.num_generated_tokens.observe(usage.num_generated_tokens)


class WorkerMetrics:
    """Owns one worker process's series."""

    def __init__(self, engine: Engine, model_name: str, role: str) -> None:
        own = CollectorRegistry()
        own.register(EngineCollector(engine))
        if engine.capabilities.num_host_blocks:
            own.register(HostTierCollector(engine))
        add_process_series(own, role)
        self.registry: CollectorRegistry = ExposedRegistry(own, {"model_name": model_name, "role": role})
        self.exchange = ExchangeMetrics(own)
        self.index = IndexMetrics(own)
        self.progress = ProgressMetrics(own)
        self.steps = StepMetrics(own)
        self.requests = RequestMetrics(own)

        self._in_handoff = WORKER.gauge("tandem:requests_in_handoff", own)
        self._draining = WORKER.gauge("tandem:draining", own)
        self._refusals = WORKER.counter("tandem:refusals", own, get_args(Refusal))
        self._orders = WORKER.counter("tandem:prefill_orders", own, get_args(OrderOutcome))
        self._prefills = WORKER.counter("tandem:prefills", own, ("local", "handoff"))
        self._handoff_failures = WORKER.counter("tandem:handoff_failures", own, _HANDOFF_FAILURES)
        self._recomputes = WORKER.counter("tandem:recomputes", own, get_args(RecomputeCause))
        self._moves = WORKER.counter("tandem:moved_requests", own, get_args(MoveOutcome))
        self._redirects = WORKER.counter("tandem:redirects", own, get_args(RedirectGoal))
        self._first_tokens = WORKER.counter("tandem:first_tokens_compared", own, ("equal", "different"))
        self._handoff_blocks = WORKER.counter("tandem:handoff_blocks", own)
        self._handoff_bytes = WORKER.counter("tandem:handoff_bytes", own)
        self._prefix_fetches = WORKER.counter("tandem:prefix_fetches", own)
        self._prefix_blocks = WORKER.counter("tandem:prefix_fetched_blocks", own, TIERS)
        self._prefix_bytes = WORKER.counter("tandem:prefix_fetched_bytes", own, TIERS)
        self._offers = WORKER.counter("tandem:offers", own, ("sent", "dropped"))
        for tier in TIERS:
            self._prefix_fetches.labels(tier, "ok")

    def watch_service(self, num_in_handoff: Callable[[], int], is_draining: Callable[[], bool]) -> None:
        """Register where to read the service's state from, at scrape time."""
        self._in_handoff.set_function(num_in_handoff)
        self._draining.set_function(is_draining)

    # ---- decode ---------------------------------------------------------------

    def refused(self, reason: Refusal) -> None:
        """An order was not taken on."""
        self._refusals.labels(reason).inc()

    def first_token(self, timeline: Timeline) -> None:
        """A request's first token goes to the router."""
        _observe(self.requests.first_token_s, timeline.seconds_between(Event.RECEIVED, Event.FIRST_TOKEN))

    def next_token(self, gap_s: float) -> None:
        """A further token, `gap_s` after the one before it."""
        self.requests.gap_s.observe(max(0.0, gap_s))

    def finished(self, timeline: Timeline, usage: pb.Usage, finish_reason: pb.FinishReason) -> None:
        """A decode worker's request has ended."""
        self.requests.finished(timeline, usage, finish_reason)
        if usage.prefilled_locally or usage.prefill_worker_id:
            self._prefills.labels("local" if usage.prefilled_locally else "handoff").inc()

    def first_token_compared(self, is_equal: bool) -> None:
        """The first token was sampled here, too."""
        self._first_tokens.labels("equal" if is_equal else "different").inc()

    def handoff_failed(self, cause: str) -> None:
        self._handoff_failures.labels(cause).inc()

    def recomputed(self, cause: RecomputeCause, number: int = 1) -> None:
        """A prompt, or what was generated from it, is computed again."""
        self._recomputes.labels(cause).inc(number)

    def moved(self, outcome: MoveOutcome) -> None:
        """A request left for another decode worker, or came from one, with its blocks or without."""
        self._moves.labels(outcome).inc()

    def redirected(self, goal: RedirectGoal) -> None:
        """A prompt goes on elsewhere, or here, since a router wanted it."""
        self._redirects.labels(goal).inc()

    def handed_off(self, num_blocks: int, num_bytes: int) -> None:
        self._handoff_blocks.inc(num_blocks)
        self._handoff_bytes.inc(num_bytes)

    # ---- prefill --------------------------------------------------------------

    def order_ended(self, outcome: OrderOutcome) -> None:
        """A decode worker's order has ended."""
        self._orders.labels(outcome).inc()

    # ---- both -----------------------------------------------------------------

    def prefix_fetched(self, tier: str, outcome: str, num_blocks: int, num_bytes: int) -> None:
        """A fetch was tried; the blocks are those that came and may be used."""
        # The word is the router's; an unknown one must not become a series.
        tier = tier if tier in TIERS else "other"
        self._prefix_fetches.labels(tier, outcome).inc()
        if num_blocks:
            self._prefix_blocks.labels(tier).inc(num_blocks)
            self._prefix_bytes.labels(tier).inc(num_bytes)

    def store_offered(self, outcome: str, number: int) -> None:
        """Chains were offered to store nodes: `outcome` is "sent" or "dropped"."""
        self._offers.labels(outcome).inc(number)


def _observe(histogram: Histogram, seconds: float | None) -> None:
    """Clocks of two machines may differ; time never runs backwards."""
    if seconds is not None:
        histogram.observe(max(0.0, seconds))
