"""An engine's Prometheus series: its queues and blocks, read when scraped, and its steps, observed as they end."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.pool import HostTier
from services.engine.native import Engine, StepOutput
from services.exposition import (
    BATCH_SEQUENCES,
    BATCH_TOKENS,
    STAGE_S,
    counter,
    gauge,
)


class StepMetrics:
    """Observes steps; called on the engine thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"tandem:{name}", help, buckets=buckets, registry=registry)

        self._seconds = histogram("step_seconds", "Time of one engine step, from scheduling to booking.", STAGE_S)
        self._tokens = histogram("step_tokens", "Tokens computed in one step.", BATCH_TOKENS)
        self._sequences = histogram("step_sequences", "Sequences in one step's batch.", BATCH_SEQUENCES)

    def ended(self, output: StepOutput) -> None:
        """A step is done."""
        self._seconds.observe(max(0.0, output.duration_s))
        self._tokens.observe(output.num_tokens)
        self._sequences.observe(len(output.updates))


class EngineCollector(Collector):
    """The engine's own figures, under the names that dashboards for vLLM know."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        # Read from another thread than the engine's: single integers, each right for some moment of this scrape.
        engine = self._engine
        load, stats, layout = engine.load(), engine.stats, engine.layout
        yield gauge("vllm:num_requests_running", "Requests in the running batch.", load.num_running)
        yield gauge(
            "vllm:num_requests_waiting", "Requests that wait for a step, or for room or bytes.", load.num_waiting
        )
        usage = 1 - load.num_free_blocks / load.num_blocks
        yield gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", usage)
        info = {
            "block_size": str(layout.block_size),
            "num_gpu_blocks": str(load.num_blocks),
            "cache_dtype": layout.dtype,
            "enable_prefix_caching": str(engine.config.enable_prefix_caching),
        }
        yield gauge("vllm:cache_config_info", "The KV cache, in its labels.", 1, info)
        path = engine.model.compute_path
        compute = {"device": engine.model.device, "kernels": path.kernels, "quantization": path.quantization}
        yield gauge("tandem:compute_info", "What computes the model, in its labels.", 1, compute)
        yield counter("vllm:num_preemptions", "Requests preempted for want of blocks.", stats.num_preemptions)
        yield counter("vllm:prefix_cache_queries", "Prompt tokens looked up here.", stats.num_prefix_queries)
        yield counter("vllm:prefix_cache_hits", "Prompt tokens found here.", stats.num_prefix_hits)
        partial_help = "Of the prompt tokens found, those in a block that goes on with other tokens: copied."
        yield counter("tandem:prefix_partial_hit_tokens", partial_help, stats.num_partial_hit_tokens)
        yield counter("vllm:prompt_tokens", "Prompt tokens computed, or computed again.", stats.num_prompt_tokens)
        yield counter("vllm:generation_tokens", "Tokens sampled here.", stats.num_generated_tokens)
        yield gauge("tandem:kv_blocks", "KV blocks in the pool.", load.num_blocks)
        yield gauge("tandem:kv_blocks_free", "KV blocks free or evictable.", load.num_free_blocks)
        yield gauge("tandem:kv_blocks_cached", "KV blocks that can be found by their prefix.", load.num_cached_blocks)
        corrupt_help = "Cached KV blocks whose bytes had changed in memory."
        yield counter("tandem:kv_blocks_corrupt", corrupt_help, self._engine.pool.stats.num_corrupt)
        yield gauge("tandem:kv_blocks_lent", "References on KV blocks held by transfers.", load.num_lent_blocks)
        yield gauge("tandem:waiting_tokens", "Tokens of prompts not computed yet.", load.num_waiting_tokens)


class HostTierCollector(Collector):
    """The host tier's own figures. "in": evicted by the paged cache; "out": back into it."""

    def __init__(self, tier: HostTier) -> None:
        self._tier = tier

    def collect(self) -> Iterable[Metric]:
        tier, stats = self._tier, self._tier.stats
        yield gauge("tandem:host_tier_blocks", "KV blocks that the host tier holds.", tier.num_blocks)
        yield gauge("tandem:host_tier_capacity_blocks", "KV blocks that it has room for.", tier.num_slots)
        yield counter("tandem:host_tier_hits", "Blocks copied back and found whole.", stats.num_restored)
        yield counter("tandem:host_tier_evictions", "Blocks given up for others.", tier.num_evicted)
        yield counter("tandem:host_tier_lost", "Evicted blocks for which there was no slot.", stats.num_lost)
        yield counter("tandem:host_tier_corrupt", "Blocks whose bytes had changed there.", stats.num_corrupt)
        copied = CounterMetricFamily("tandem:host_tier_bytes", "Bytes copied.", labels=["direction"])
        copied.add_metric(["in"], stats.num_offloaded * tier.block_bytes)
        copied.add_metric(["out"], (stats.num_restored + stats.num_corrupt) * tier.block_bytes)
        yield copied
        seconds = CounterMetricFamily("tandem:host_tier_seconds", "Time spent copying.", labels=["direction"])
        seconds.add_metric(["in"], stats.offload_s)
        seconds.add_metric(["out"], stats.restore_s)
        yield seconds
