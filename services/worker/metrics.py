"""A worker's Prometheus series. Engine figures are read when scraped, all else is counted as it ends."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from tandem.v1 import worker_pb2 as pb

from kvstore.fetch_events import FetchResult
from kvstore.host_tier import HostTier
from kvstore.lease import LeaseOutcome
from kvstore.observer import ExchangeObserver
from services.engine.engine import Engine
from services.lifecycle import Event, Timeline

_STAGE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# A stage of the handoff is the time between two events of the request's timeline.
_STAGES = {
    "prefill_queue": (Event.PREFILL_QUEUED, Event.PREFILL_SCHEDULED),
    "prefill": (Event.PREFILL_SCHEDULED, Event.PREFILL_FINISHED),
    "handoff": (Event.PREFILL_FINISHED, Event.DECODE_JOINED),
    "first_token": (Event.RECEIVED, Event.FIRST_TOKEN),
    "decode": (Event.FIRST_TOKEN, Event.FINISHED),
    "total": (Event.RECEIVED, Event.FINISHED),
}


class WorkerMetrics(ExchangeObserver):
    """Owns one process's registry; also the observer of its block exchange."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model_name))
        if engine.host_tier is not None:
            self.registry.register(_HostTierCollector(engine.host_tier))
        self._stage_s = Histogram(
            "tandem:request_stage_seconds",
            "Time of each stage of a request on this worker.",
            ["stage"],
            buckets=_STAGE_BUCKETS_S,
            registry=self.registry,
        )
        self._finished = self._counter("tandem:requests", "Requests ended here, by finish reason.", "finished_reason")
        self._recomputes = self._counter("tandem:handoff_failures", "Handoffs that came to nothing, by cause.", "cause")
        self._prefills = self._counter("tandem:prefills", "Prompts that came into the engine, by way.", "way")
        self._handoff_blocks = self._counter("tandem:handoff_blocks", "Blocks taken over from prefill workers.")
        self._handoff_bytes = self._counter("tandem:handoff_bytes", "Bytes of these blocks.")
        self._prefix_fetches = self._counter("tandem:prefix_fetches", "Prefixes fetched.", "tier", "outcome")
        self._store_offers = self._counter("tandem:store_offers", "Chains offered to store nodes.", "outcome")
        self._refused_peers = self._counter("tandem:peers_refused", "Incompatible peers refused.")
        self._lost_peers = self._counter("tandem:peers_lost", "Block-protocol connections that ended.")
        self._read_s = Histogram(
            "tandem:transfer_seconds",
            "Time of one read of blocks, by lane.",
            ["lane"],
            buckets=_STAGE_BUCKETS_S,
            registry=self.registry,
        )
        self._read_bytes = self._counter("tandem:transfer_bytes", "Bytes read from peers.", "lane", "outcome")
        self._digests = self._counter("tandem:digests_checked", "Blocks whose payload digest was checked.")
        self._fetches = self._counter("tandem:fetches", "Fetches ended, by outcome.", "outcome")
        self._leases = self._counter("tandem:leases", "Leases closed, by outcome.", "outcome")

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def finished(self, timeline: Timeline, usage: pb.Usage, finish_reason: pb.FinishReason) -> None:
        """A decode worker's request has ended."""
        name = pb.FinishReason.Name(finish_reason).removeprefix("FINISH_REASON_").lower()
        self._finished.labels(name).inc()
        if usage.prefilled_locally or usage.prefill_worker_id:
            self._prefills.labels("local" if usage.prefilled_locally else "handoff").inc()
        for stage, (start, end) in _STAGES.items():
            seconds = timeline.seconds_between(start, end)
            if seconds is not None and not (stage == "handoff" and usage.prefilled_locally):
                self._stage_s.labels(stage).observe(max(0.0, seconds))

    def prefix_fetched(self, tier: str, outcome: str) -> None:
        self._prefix_fetches.labels(tier, outcome).inc()

    def store_offered(self, outcome: str, number: int) -> None:
        """Chains were offered to store nodes: `outcome` is "sent" or "dropped"."""
        self._store_offers.labels(outcome).inc(number)

    def handoff_failed(self, cause: str) -> None:
        self._recomputes.labels(cause).inc()

    def handed_off(self, num_blocks: int, num_bytes: int) -> None:
        self._handoff_blocks.inc(num_blocks)
        self._handoff_bytes.inc(num_bytes)

    def peer_refused(self, peer: str, reason: str) -> None:
        self._refused_peers.inc()

    def peer_lost(self, peer_id: str, reason: str, we_read: bool) -> None:
        self._lost_peers.inc()

    def read_ended(self, peer_id: str, lane: str, num_blocks: int, num_bytes: int, duration_s: float, ok: bool) -> None:
        self._read_s.labels(lane).observe(duration_s)
        self._read_bytes.labels(lane, "ok" if ok else "failed").inc(num_bytes)

    def digests_checked(self, peer_id: str, num_blocks: int) -> None:
        self._digests.inc(num_blocks)

    def fetch_ended(self, peer_id: str, result: FetchResult, duration_s: float) -> None:
        self._fetches.labels("ok" if result.failure is None else result.failure.cause.value).inc()

    def lease_ended(self, peer_id: str, outcome: LeaseOutcome, num_blocks: int, duration_s: float) -> None:
        self._leases.labels(outcome.value).inc()


class _EngineCollector(Collector):
    """The engine's own figures, under the names that dashboards for vLLM know."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name}

    def collect(self) -> Iterable[Metric]:
        # Read from another thread than the engine's: single integers, each right for some moment of this scrape.
        load, stats, layout = self._engine.load(), self._engine.stats, self._engine.layout
        model = self._labels
        yield _gauge("vllm:num_requests_running", "Requests in the running batch.", load.num_running, model)
        yield _gauge("vllm:num_requests_waiting", "Requests that wait for their first step.", load.num_waiting, model)
        usage = 1 - load.num_free_blocks / load.num_blocks
        yield _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", usage, model)
        info = {
            "block_size": str(layout.block_size),
            "num_gpu_blocks": str(load.num_blocks),
            "cache_dtype": layout.dtype,
        }
        yield _gauge("vllm:cache_config_info", "The KV cache, in its labels.", 1, info)
        yield _counter("vllm:num_preemptions", "Requests preempted.", stats.num_preemptions, model)
        yield _counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.num_prefix_queries, model)
        yield _counter("vllm:prefix_cache_hits", "Prompt tokens found.", stats.num_prefix_hits, model)
        partial_help = "Of the prompt tokens found, those in a block that goes on with other tokens: copied."
        yield _counter("tandem:prefix_partial_hit_tokens", partial_help, stats.num_partial_hit_tokens, model)
        yield _counter("vllm:prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens, model)
        yield _counter("vllm:generation_tokens", "Tokens generated.", stats.num_generated_tokens, model)
        yield _gauge("tandem:kv_blocks_free", "KV blocks free or evictable.", load.num_free_blocks, model)
        yield _gauge("tandem:kv_blocks", "KV blocks in the pool.", load.num_blocks, model)
        yield _gauge("tandem:waiting_tokens", "Prompt tokens not yet computed.", load.num_waiting_tokens, model)
        yield _counter("tandem:engine_steps", "Engine steps.", stats.num_steps, model)


class _HostTierCollector(Collector):
    """The host tier's own figures. "in": evicted by the paged cache; "out": back into it."""

    def __init__(self, tier: HostTier) -> None:
        self._tier = tier

    def collect(self) -> Iterable[Metric]:
        tier, stats = self._tier, self._tier.stats
        yield _gauge("tandem:host_tier_blocks", "KV blocks that the host tier holds.", tier.num_blocks, {})
        yield _gauge("tandem:host_tier_capacity_blocks", "KV blocks that it has room for.", tier.num_slots, {})
        yield _counter("tandem:host_tier_hits", "Blocks copied back and found whole.", stats.num_restored, {})
        yield _counter("tandem:host_tier_evictions", "Blocks given up for others.", tier.num_evicted, {})
        yield _counter("tandem:host_tier_lost", "Evicted blocks for which there was no slot.", stats.num_lost, {})
        yield _counter("tandem:host_tier_corrupt", "Blocks whose bytes had changed there.", stats.num_corrupt, {})
        copied = CounterMetricFamily("tandem:host_tier_bytes", "Bytes copied.", labels=["direction"])
        copied.add_metric(["in"], stats.num_offloaded * tier.block_bytes)
        copied.add_metric(["out"], (stats.num_restored + stats.num_corrupt) * tier.block_bytes)
        yield copied
        seconds = CounterMetricFamily("tandem:host_tier_seconds", "Time spent copying.", labels=["direction"])
        seconds.add_metric(["in"], stats.offload_s)
        seconds.add_metric(["out"], stats.restore_s)
        yield seconds


def _gauge(name: str, help: str, value: float, labels: dict[str, str]) -> Metric:
    family = GaugeMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, help: str, value: float, labels: dict[str, str]) -> Metric:
    family = CounterMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
