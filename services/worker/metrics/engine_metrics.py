"""Exports an engine's series: queues and blocks, read when scraped, and steps, observed as they end."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from services.engine.api import Engine, StepOutput
from services.metric_families import WORKER


class StepMetrics:
    """Observes steps; called on the engine thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = WORKER.histogram("tandem:step_seconds", registry)
        self._tokens = WORKER.histogram("tandem:step_tokens", registry)
        self._sequences = WORKER.histogram("tandem:step_sequences", registry)

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
        yield WORKER.read("vllm:num_requests_running", load.num_running)
        yield WORKER.read("vllm:num_requests_waiting", load.num_waiting)
        usage = 1 - load.num_free_blocks / load.num_blocks
        yield WORKER.read("vllm:kv_cache_usage_perc", usage)
        info = {
            "block_size": str(layout.block_size),
            "num_gpu_blocks": str(load.num_blocks),
            "cache_dtype": engine.capabilities.kv_cache_dtype,
            "enable_prefix_caching": str(engine.capabilities.caches_prefixes),
        }
        yield WORKER.read("vllm:cache_config_info", 1, info)
        yield WORKER.read("tandem:compute_info", 1, dict(engine.capabilities.compute))
        yield WORKER.read("vllm:num_preemptions", stats.num_preemptions)
        yield WORKER.read("vllm:prefix_cache_queries", stats.num_prefix_queries)
        yield WORKER.read("vllm:prefix_cache_hits", stats.num_prefix_hits)
        yield WORKER.read("tandem:prefix_partial_hit_tokens", stats.num_partial_hit_tokens)
        yield WORKER.read("vllm:prompt_tokens", stats.num_prompt_tokens)
        yield WORKER.read("vllm:generation_tokens", stats.num_generated_tokens)
        yield WORKER.read("vllm:spec_decode_num_drafts", stats.num_drafts)
        yield WORKER.read("vllm:spec_decode_num_draft_tokens", stats.num_draft_tokens)
        yield WORKER.read("vllm:spec_decode_num_accepted_tokens", stats.num_accepted_tokens)
        yield WORKER.read("tandem:kv_blocks", load.num_blocks)
        yield WORKER.read("tandem:kv_blocks_free", load.num_free_blocks)
        yield WORKER.read("tandem:kv_blocks_cached", load.num_cached_blocks)
        yield WORKER.read("tandem:kv_blocks_corrupt", stats.num_corrupt_blocks)
        yield WORKER.read("tandem:kv_blocks_lent", load.num_lent_blocks)
        yield WORKER.read("tandem:waiting_tokens", load.num_waiting_tokens)


class HostTierCollector(Collector):
    """The host tier's own figures. "in": evicted by the paged cache; "out": back into it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        tier, block_bytes = self._engine.host_figures(), self._engine.layout.block_bytes
        yield WORKER.read("tandem:host_tier_blocks", tier["num_blocks"])
        yield WORKER.read("tandem:host_tier_capacity_blocks", tier["num_slots"])
        yield WORKER.read("tandem:host_tier_hits", tier["num_restored"])
        yield WORKER.read("tandem:host_tier_evictions", tier["num_evicted"])
        yield WORKER.read("tandem:host_tier_lost", tier["num_lost"])
        yield WORKER.read("tandem:host_tier_corrupt", tier["num_corrupt"])
        copied = WORKER.family("tandem:host_tier_bytes")
        copied.add_metric(["in"], tier["num_offloaded"] * block_bytes)
        copied.add_metric(["out"], (tier["num_restored"] + tier["num_corrupt"]) * block_bytes)
        yield copied
        seconds = WORKER.family("tandem:host_tier_seconds")
        seconds.add_metric(["in"], tier["offload_s"])
        seconds.add_metric(["out"], tier["restore_s"])
        yield seconds
