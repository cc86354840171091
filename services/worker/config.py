"""Settings that both kinds of worker share. Flags are spelled as `vllm serve` spells them where they mean the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services import node_settings
from services.settings import SettingsError, setting

# Of the block protocol; see kvstore.protocol.timeouts.
_HEARTBEAT_S = 1.0
_WILDCARDS = ("", "0.0.0.0", "::", "[::]")


@dataclass(frozen=True)
class WorkerConfig:
    """One worker process: what it serves, how much memory it takes, and where it listens."""

    model: str = setting(
        "", help="directory of a Hugging Face model, or its name on the hub", flags=("--model",), group="model"
    )
    served_model_name: tuple[str, ...] = setting(
        (), help="name(s) under which clients ask for the model; the default is the value of --model", group="model"
    )
    tokenizer: str = setting(
        "", help="directory or hub name of the tokenizer; the default is the model's", group="model"
    )
    revision: str = setting("", help="branch, tag or commit on the hub", group="model")
    dtype: str = setting(
        "auto",
        help="of weights, activations and KV cache; auto takes the model's own",
        choices=("auto", "float32", "float16", "bfloat16", "half", "float"),
        group="model",
    )
    quantization: str = setting(
        "none",
        help="int8 computes the layers' projections in 8 bits (W8A8): half the memory, less exact; on CPUs with the"
        " C kernels only",
        choices=("none", "int8"),
        group="model",
    )
    cpu_kernels: str = setting(
        "auto",
        help="what computes bfloat16 on a CPU: auto takes the C kernels where the processor has AVX-512 BF16 or AMX,"
        " else torch",
        choices=("auto", "torch"),
        group="model",
    )
    device: str = setting(
        "auto", help="auto takes cuda where there is one, else cpu", choices=("auto", "cpu", "cuda"), group="model"
    )
    max_model_len: int = setting(
        0, help="longest prompt plus output, in tokens; 0 takes the model's own", group="model"
    )
    block_size: int = setting(
        32, help="tokens in a KV block; equal on all workers of a model", choices=(16, 32, 64), group="KV cache"
    )
    num_gpu_blocks_override: int = setting(
        0, help="KV blocks in the pool, on whatever device; 0: from the memory size", group="KV cache"
    )
    kv_cache_memory_bytes: int = setting(
        0, help="size of the KV pool, e.g. 4GiB; 0: a share of the memory there is", group="KV cache"
    )
    gpu_memory_utilization: float = setting(0.9, help="share of the GPU's memory to use (CUDA only)", group="KV cache")
    kv_offloading_size: float = setting(
        0.0,
        help="GiB of main memory for KV blocks that the pool evicts, of each worker; they come back as prefix hits;"
        " 0: none",
        group="KV cache",
    )
    max_num_seqs: int = setting(64, help="requests in one step at most", group="scheduling")
    max_num_batched_tokens: int = setting(
        512, help="token budget of a step; also the longest prefill chunk", group="scheduling"
    )
    max_num_waiting: int = setting(
        1024, help="requests that may wait for their first step; more are refused", group="scheduling"
    )
    enable_prefix_caching: bool = setting(True, help="reuse the KV blocks of equal prefixes", group="KV cache")
    num_threads: int = setting(0, help="compute threads (CPU); 0: as many as the process may use", group="model")
    host: str = node_settings.host()
    port: int = setting(0, help="gRPC port; 0 chooses a free one", group="network")
    kv_port: int = node_settings.kv_port()
    http_port: int = node_settings.http_port()
    advertise_host: str = node_settings.advertise_host("others reach this worker")
    redis: str = node_settings.redis()
    worker_id: str = node_settings.worker_id("this worker", "ROLE-HOST-PORT")
    kv_transport: str = node_settings.kv_transport("RDMA, CUDA IPC and shared memory")
    lease_s: float = node_settings.lease_s("a worker")
    peer_timeout_s: float = node_settings.peer_timeout_s()
    prefix_fetch_timeout_s: float = setting(
        5.0,
        help="how long nothing may come of a prefix that another worker holds; then it is computed",
        group="network",
    )
    prefix_fetch: str = setting(
        "measured",
        help="when a prefix is fetched from another holder: where that was measured to be quicker than computing it,"
        " always, or never",
        choices=("measured", "always", "never"),
        group="KV cache",
    )
    store_write_through: str = setting(
        "all",
        help="which blocks are offered to store nodes, where there are any: all, those that were reused here, or none",
        choices=("all", "reused", "none"),
        group="KV cache",
    )
    drain_timeout_s: float = node_settings.drain_timeout_s("running requests")
    log_level: str = node_settings.log_level()
    log_format: str = node_settings.log_format()

    def __post_init__(self) -> None:
        if not self.model:
            raise SettingsError("give the directory of a Hugging Face model, or its name on the hub (--model)", "model")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting"):
            if getattr(self, name) < 1:
                raise SettingsError(f"must be at least 1, got {getattr(self, name)}", name)
        for name in ("max_model_len", "num_gpu_blocks_override", "kv_cache_memory_bytes", "num_threads"):
            if getattr(self, name) < 0:
                raise SettingsError(f"must not be negative, got {getattr(self, name)}", name)
        if not 0 <= self.kv_offloading_size < math.inf:
            raise SettingsError(
                f"must be a number of GiB, not negative, got {self.kv_offloading_size}", "kv_offloading_size"
            )
        if self.kv_offloading_size and not self.enable_prefix_caching:
            raise SettingsError("needs prefix caching: what it keeps is found by prefix", "kv_offloading_size")
        node_settings.check_ports(self, "port", "kv_port", "http_port")
        node_settings.check_positive(self, "lease_s", "peer_timeout_s", "prefix_fetch_timeout_s", "drain_timeout_s")
        if self.peer_timeout_s <= _HEARTBEAT_S:
            message = f"must be longer than the heartbeat of {_HEARTBEAT_S:g} s, got {self.peer_timeout_s}"
            raise SettingsError(message, "peer_timeout_s")
        if self.host in _WILDCARDS and not self.advertise_host:
            raise SettingsError(f"{self.host} is no address that others can dial: give --advertise-host too", "host")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SettingsError(
                f"must be in (0, 1], got {self.gpu_memory_utilization}",
                "gpu_memory_utilization",
            )
