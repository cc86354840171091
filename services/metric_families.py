"""Declares every metric family of our processes once: name, type, help, labels and bucket edges.

Collectors are made of these tables and of nothing else; a test holds docs/metrics.md against them. The request series
have vLLM's names and edges, with some smaller ones in front for small models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


@dataclass(frozen=True)
class Family:
    """`name` as on the `# TYPE` line of prometheus-client: a counter's samples end in `_total`."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    over_processes: Literal["sum", "max", "min"] = "sum"
    """Of a gauge: what it is for a router of several processes, which all see the same fleet and have each their own
    requests."""


class Table(dict[str, Family]):
    """The families of one kind of process, by name. What is not declared here cannot be made: KeyError."""

    def __init__(self, *families: Family) -> None:
        super().__init__({family.name: family for family in families})

    def of_type(self, type: str) -> list[str]:
        return [family.name for family in self.values() if family.type == type]

    def counter(self, name: str, registry: CollectorRegistry, values: Iterable[str] = ()) -> Counter:
        """`values`: of its one label, made at once: rates see the first event only of a series that was there."""
        family = self[name]
        counter = Counter(name, family.help, family.labels, registry=registry)
        for value in values:
            counter.labels(value)
        return counter

    def gauge(self, name: str, registry: CollectorRegistry) -> Gauge:
        family = self[name]
        return Gauge(name, family.help, family.labels, registry=registry)

    def histogram(self, name: str, registry: CollectorRegistry) -> Histogram:
        family = self[name]
        return Histogram(name, family.help, family.labels, buckets=family.buckets, registry=registry)

    def family(self, name: str) -> CounterMetricFamily | GaugeMetricFamily:
        """Make the family that a collector fills when it is scraped."""
        family = self[name]
        make = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
        return make(name, family.help, labels=family.labels)

    def read(
        self, name: str, value: float, labels: Mapping[str, str] | None = None
    ) -> CounterMetricFamily | GaugeMetricFamily:
        """Make the family with its one value."""
        family = self.family(name)
        family.add_metric([(labels or {})[label] for label in self[name].labels], value)
        return family


def _counter(name: str, help: str, *labels: str) -> Family:
    return Family(name, "counter", help, labels)


def _gauge(name: str, help: str, *labels: str, over_processes: Literal["sum", "max", "min"] = "sum") -> Family:
    return Family(name, "gauge", help, labels, over_processes=over_processes)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Family:
    return Family(name, "histogram", help, labels, buckets)


_TTFT_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_S: Final = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_STAGE_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""A stage of a request: from a block's read over RDMA to a long prompt on a laptop."""
_READ_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SPEED_BYTES_PER_S: Final = (1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10, 2e10, 4e10, 1e11, 4e11)
"""From a bad network to NVLink."""
_PAUSE_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0)
_INDEX_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
_TOKENS: Final = tuple(mantissa * 10**exponent for exponent in range(7) for mantissa in (1, 2, 5))
_BATCH_TOKENS: Final = tuple(float(2**exponent) for exponent in range(16))
_BATCH_SEQUENCES: Final = tuple(float(2**exponent) for exponent in range(11))
_BY_MODEL: Final = ("model_name", "role")

# Of whoever exchanges blocks and announces itself: workers and store nodes.
NODE = Table(
    _histogram("tandem:transfer_seconds", "Time of one read of blocks from a peer, by lane.", _READ_S, "lane"),
    _histogram(
        "tandem:transfer_bytes_per_second",
        "Speed of one read; reads that run side by side share the lane.",
        _SPEED_BYTES_PER_S,
        "lane",
    ),
    _counter("tandem:transfer_bytes", "Bytes of reads that have ended.", "lane", "outcome"),
    _counter("tandem:digests_checked", "Blocks held against their proofs after a read."),
    _counter("tandem:digests_failed", "Blocks that their proofs did not prove; none was used."),
    _counter("tandem:fetches", "Transfers that we read, by outcome.", "outcome"),
    _counter("tandem:leases", "Transfers that others read from us, by outcome.", "outcome"),
    _counter("tandem:leased_blocks", "Blocks announced in these leases.", "outcome"),
    _histogram("tandem:lease_seconds", "Life of a lease.", _STAGE_S),
    _counter("tandem:peers_refused", "Incompatible peers refused."),
    _counter("tandem:peers_unproven", "Times that somebody without the peers' secret was refused.", "port"),
    _counter("tandem:peers_lost", "Block-protocol connections that ended."),
    _gauge("tandem:transport_up", "Whether blocks can travel over a transport.", "transport"),
    _histogram("tandem:index_write_seconds", "Time that the prefix index took for one batch of changes.", _INDEX_S),
    _counter("tandem:index_written_blocks", "Blocks in these batches."),
    _counter("tandem:index_resyncs", "Times that all blocks were announced anew.", "reason"),
    _gauge("tandem:index_pending_blocks", "Changes that wait to be written to the index."),
    _gauge("tandem:index_up", "Whether the prefix index takes our changes."),
    _gauge("tandem:registry_up", "Whether the registry in Redis answers this process."),
    _gauge("tandem:stuck_seconds", "How long a part with work to do has stood still; 0: it gets on.", "part"),
)

WORKER = Table(
    _histogram("tandem:step_seconds", "Time of one engine step, from scheduling to booking.", _STAGE_S),
    _histogram("tandem:step_tokens", "Tokens computed in one step.", _BATCH_TOKENS),
    _histogram("tandem:step_sequences", "Sequences in one step's batch.", _BATCH_SEQUENCES),
    _counter("tandem:host_tier_bytes", "Bytes copied.", "direction"),
    _counter("tandem:host_tier_seconds", "Time spent copying.", "direction"),
    _gauge("vllm:num_requests_running", "Requests in the running batch."),
    _gauge("vllm:num_requests_waiting", "Requests that wait for a step, or for room or bytes."),
    _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all."),
    _gauge(
        "vllm:cache_config_info",
        "The KV cache, in its labels.",
        "block_size",
        "num_gpu_blocks",
        "cache_dtype",
        "enable_prefix_caching",
    ),
    _gauge("tandem:compute_info", "What computes the model, in its labels.", "device", "kernels", "quantization"),
    _counter("vllm:num_preemptions", "Requests preempted for want of blocks."),
    _counter("vllm:prefix_cache_queries", "Prompt tokens looked up here."),
    _counter("vllm:prefix_cache_hits", "Prompt tokens found here."),
    _counter(
        "tandem:prefix_partial_hit_tokens",
        "Of the prompt tokens found, those in a block that goes on with other tokens: copied.",
    ),
    _counter("vllm:prompt_tokens", "Prompt tokens computed, or computed again."),
    _counter("vllm:generation_tokens", "Tokens sampled here."),
    _counter("vllm:spec_decode_num_drafts", "Steps of a request that tried guessed tokens."),
    _counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed."),
    _counter("vllm:spec_decode_num_accepted_tokens", "Of these, the ones that came true."),
    _gauge("tandem:kv_blocks", "KV blocks in the pool."),
    _gauge("tandem:kv_blocks_free", "KV blocks free or evictable."),
    _gauge("tandem:kv_blocks_cached", "KV blocks that can be found by their prefix."),
    _counter("tandem:kv_blocks_corrupt", "Cached KV blocks whose bytes had changed in memory."),
    _gauge("tandem:kv_blocks_lent", "References on KV blocks held by transfers."),
    _gauge("tandem:waiting_tokens", "Tokens of prompts not computed yet."),
    _gauge("tandem:host_tier_blocks", "KV blocks that the host tier holds."),
    _gauge("tandem:host_tier_capacity_blocks", "KV blocks that it has room for."),
    _counter("tandem:host_tier_hits", "Blocks copied back and found whole."),
    _counter("tandem:host_tier_evictions", "Blocks given up for others."),
    _counter("tandem:host_tier_lost", "Evicted blocks for which there was no slot."),
    _counter("tandem:host_tier_corrupt", "Blocks whose bytes had changed there."),
    _histogram("vllm:time_to_first_token_seconds", "From the order's arrival here to its first token.", _TTFT_S),
    _histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _ITL_S),
    _histogram("vllm:request_time_per_output_token_seconds", "Mean per token of a request after its first.", _ITL_S),
    _histogram("vllm:e2e_request_latency_seconds", "From the order's arrival here to its last token.", _REQUEST_S),
    _histogram("vllm:request_queue_time_seconds", "In the queue here, for prompts computed here.", _REQUEST_S),
    _histogram("vllm:request_prefill_time_seconds", "From first chunk to last, for prompts computed here.", _REQUEST_S),
    _histogram("vllm:request_decode_time_seconds", "From a request's first token to its last.", _REQUEST_S),
    _histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS),
    _histogram("vllm:request_generation_tokens", "Generated tokens per request.", _TOKENS),
    _counter("vllm:request_success", "Requests that ended here, by reason.", "finished_reason"),
    _histogram(
        "tandem:request_stage_seconds", "Time of each stage of a request; see docs/metrics.md.", _STAGE_S, "stage"
    ),
    _gauge("tandem:requests_in_handoff", "Requests whose prompt is being brought into the engine."),
    _gauge("tandem:draining", "Whether the worker refuses new work and will end."),
    _counter("tandem:refusals", "Orders not taken on, by reason.", "reason"),
    _counter("tandem:prefill_orders", "Orders of decode workers to prefill a prompt, by outcome.", "outcome"),
    _counter("tandem:prefills", "Prompts that came into the engine, by way.", "way"),
    _counter("tandem:first_tokens_compared", "First tokens that both workers of a handoff sampled.", "outcome"),
    _counter("tandem:handoff_failures", "Handoffs that came to nothing, by cause.", "cause"),
    _counter("tandem:recomputes", "Prompts that had to be computed again, by cause.", "cause"),
    _counter("tandem:moved_requests", "Requests that went on at another decode worker, by outcome.", "outcome"),
    _counter("tandem:redirects", "Prompts that another worker went on with as a router wanted it, by where.", "goal"),
    _counter("tandem:handoff_blocks", "Blocks taken over from prefill workers."),
    _counter("tandem:handoff_bytes", "Bytes of these blocks."),
    _counter("tandem:prefix_fetches", "Pieces of prefixes asked of others.", "tier", "outcome"),
    _counter("tandem:prefix_fetched_blocks", "Blocks of prefixes that came from them.", "tier"),
    _counter("tandem:prefix_fetched_bytes", "Bytes of these blocks.", "tier"),
    _counter("tandem:offers", "Chains that this worker told store nodes of.", "outcome"),
)

STORE = Table(
    _gauge("tandem:store_blocks", "Blocks kept, by tier.", "tier"),
    _counter("tandem:store_queries", "Blocks asked for, by where they were.", "tier"),
    _counter("tandem:store_corrupt_blocks", "Blocks whose bytes had changed.", "tier"),
    _counter("tandem:store_refuted_blocks", "Blocks dropped since a reader found their proofs wrong."),
    _counter("tandem:store_doubted_blocks", "Blocks kept although a reader found so: too many at once."),
    _counter("tandem:store_offers", "Offers of workers, by what came of them.", "outcome"),
    _gauge("tandem:store_slots", "Blocks that the memory can hold."),
    _gauge("tandem:store_lent_blocks", "Blocks lent at present."),
    _gauge("tandem:store_offers_queued", "Offers that wait."),
    _counter("tandem:store_evicted_blocks", "Blocks evicted from memory."),
    _counter("tandem:store_pulled_blocks", "Blocks taken over from workers."),
    _counter("tandem:store_pulled_bytes", "Bytes of these."),
    _gauge("tandem:store_disk_bytes", "Bytes of disk taken."),
    _gauge("tandem:store_disk_paused", "Whether the disk refused the last write."),
    _counter("tandem:store_lost_blocks", "Evicted, and not taken by the disk."),
)

# By model, from the requests themselves: the router.
REQUESTS = Table(
    _histogram(
        "vllm:time_to_first_token_seconds", "From the request's arrival to its first token.", _TTFT_S, *_BY_MODEL
    ),
    _histogram("vllm:inter_token_latency_seconds", "Between a request's outputs, per token.", _ITL_S, *_BY_MODEL),
    _histogram(
        "vllm:request_time_per_output_token_seconds", "Mean per token of a request after its first.", _ITL_S, *_BY_MODEL
    ),
    _histogram(
        "vllm:e2e_request_latency_seconds", "From the request's arrival to its last token.", _REQUEST_S, *_BY_MODEL
    ),
    _histogram("vllm:request_queue_time_seconds", "In the queue of the worker that prefills.", _REQUEST_S, *_BY_MODEL),
    _histogram(
        "vllm:request_prefill_time_seconds", "From the prompt's first chunk to its last.", _REQUEST_S, *_BY_MODEL
    ),
    _histogram("vllm:request_decode_time_seconds", "From a request's first token to its last.", _REQUEST_S, *_BY_MODEL),
    _histogram("vllm:request_prompt_tokens", "Prompt tokens per sequence.", _TOKENS, *_BY_MODEL),
    _histogram("vllm:request_generation_tokens", "Generated tokens per sequence.", _TOKENS, *_BY_MODEL),
    _counter("vllm:prompt_tokens", "Prompt tokens of requests that were sent to workers.", *_BY_MODEL),
    _counter("vllm:generation_tokens", "Generated tokens.", *_BY_MODEL),
    _counter("vllm:prefix_cache_queries", "Prompt tokens of sequences that ended regularly.", *_BY_MODEL),
    _counter("vllm:prefix_cache_hits", "Of these, reused or fetched instead of computed.", *_BY_MODEL),
    _counter("vllm:request_success", "Sequences that ended, by reason.", *_BY_MODEL, "finished_reason"),
    _gauge("vllm:num_requests_running", "Sequences that have had a token.", *_BY_MODEL),
    _gauge(
        "vllm:num_requests_waiting", "Sequences without a token yet, those that wait in the router too.", *_BY_MODEL
    ),
)

ROUTER = Table(
    *REQUESTS.values(),
    _counter("tandem:router_requests", "HTTP requests that ended, by endpoint and status.", "endpoint", "status"),
    _counter("tandem:router_errors", "Error answers, by HTTP status.", "status"),
    _counter("tandem:router_refusals", "Requests not taken on, by reason.", "reason"),
    _counter("tandem:router_retries", "Sequences given to another decode worker."),
    _counter("tandem:router_cut_connections", "Connections that were ended by the router, by reason.", "reason"),
    _counter(
        "tandem:router_resumes", "Pauses in begun sequences, by cause and by what came of them.", "reason", "outcome"
    ),
    _histogram("tandem:router_resume_pause_seconds", "From a lost worker's last token to the next one.", _PAUSE_S),
    _counter(
        "tandem:router_resumed_tokens", "Tokens of prompts and output so far, by where their KV came from.", "source"
    ),
    _counter("tandem:router_client_disconnects", "Requests that the client cut."),
    _counter(
        "tandem:router_decisions",
        "Choices of workers, by what decided and by who is to prefill.",
        "policy",
        "reason",
        "prefill",
    ),
    _counter(
        "tandem:router_deflections",
        "Prompts and answers computed where the workers' roles have another place for them, by the worker's role.",
        "direction",
    ),
    _counter(
        "tandem:router_redirects",
        "Prompts without a token that were told to go on elsewhere, by the role of who computes the rest.",
        "direction",
    ),
    _counter("tandem:router_index_lookups", "Questions to the prefix index.", "outcome"),
    _histogram("tandem:router_index_lookup_seconds", "How long they took.", _INDEX_S),
    _gauge(
        "tandem:router_index_up", "Whether the prefix index answers; 0 also where there is none.", over_processes="min"
    ),
    _gauge(
        "tandem:router_quotas_shared",
        "Whether Redis keeps the tenants' limits; 0: this router its part of them.",
        over_processes="min",
    ),
    _counter(
        "tandem:requests_objective_met",
        "Sequences that had an objective, by whether they met it; both: the one or two that they had.",
        "model_name",
        "objective",
        "met",
    ),
    _gauge("tandem:controller_leader", "Models whose elastic workers this router leads."),
    _counter("tandem:controller_flips", "Roles that were changed, by the new one.", "role"),
    _gauge(
        "tandem:worker_role",
        "Elastic workers by the role that they say they have: 1.",
        "worker_id",
        "role",
        over_processes="max",
    ),
    _gauge("tandem:router_registry_up", "Whether the registry in Redis answers.", over_processes="min"),
    _counter("tandem:router_receipts", "Sequences that ended regularly and whose worker said what they cost."),
    _counter("tandem:router_receipt_prompt_tokens", "Prompt tokens, by where their KV came from.", "source"),
    _counter("tandem:router_cached_tokens", "Prompt tokens that were not computed: reused or fetched."),
    _counter("tandem:router_fetched_blocks", "Prefix blocks pulled from other holders.", "tier"),
    _counter("tandem:router_fetched_bytes", "The same in bytes.", "tier"),
    _counter("tandem:router_handoff_blocks", "Blocks read from prefill workers."),
    _counter("tandem:router_handoff_bytes", "The same in bytes."),
    _counter("tandem:router_digests_checked", "Blocks whose payload was checked before use."),
    _counter("tandem:router_recomputes", "Prompts computed again after a fault or a preemption."),
    _gauge("tandem:router_workers_known", "Workers in the registry.", "role", over_processes="max"),
    _gauge(
        "tandem:router_queued_tokens",
        "Prompt tokens sent to workers, without a token yet.",
        "role",
    ),
    _gauge(
        "vllm:kv_cache_usage_perc",
        "Share of the decode workers' KV blocks in use, by their last reports; 1 is all.",
        *_BY_MODEL,
        over_processes="max",
    ),
    _gauge("tandem:router_sessions_up", "Decode workers with a live session.", over_processes="max"),
)
