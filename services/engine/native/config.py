"""An engine's settings: the part of a worker's configuration that concerns model, memory and scheduling. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.engine.native.scheduling import EngineError


class InvalidConfig(EngineError, ValueError):
    """An engine setting is out of range, or two contradict each other; the message names them."""


@dataclass(frozen=True)
class EngineConfig:
    """Names and meanings are those of `vllm serve`; 0 and "" mean: choose a default. Raises `InvalidConfig`."""

    model: str  # directory, or name on the hub
    revision: str = ""
    dtype: str = "auto"
    device: str = "auto"  # "auto", "cpu", "cuda" or "cuda:N"
    max_model_len: int = 0  # prompt and output tokens of one request; 0: the model's own
    block_size: int = 32
    num_gpu_blocks_override: int = 0  # KV blocks, on whatever device; 0: from the memory size
    kv_cache_memory_bytes: int = 0  # 0: a share of the memory there is
    gpu_memory_utilization: float = 0.9  # CUDA only
    kv_offloading_size: float = 0.0  # GiB of main memory for blocks that the pool evicts; 0: none
    max_num_seqs: int = 64  # a step has no more rows than max_num_batched_tokens either
    max_num_batched_tokens: int = 512
    long_prefill_token_threshold: int = 0  # tokens of one prompt in one step; 0: max_num_batched_tokens
    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    quantization: str = "none"  # or "int8": the layers' projections, on CPUs with the C kernels
    cpu_kernels: str = "auto"  # "auto": the C kernels where they can compute the model; "torch": never
    num_threads: int = 0  # compute threads (CPU); 0: torch's default

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidConfig("model: must be a directory or a name on the hub")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_num_waiting"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in (
            "max_model_len",
            "num_gpu_blocks_override",
            "kv_cache_memory_bytes",
            "long_prefill_token_threshold",
            "num_threads",
        ):
            if getattr(self, name) < 0:
                raise InvalidConfig(f"{name}: must not be negative, got {getattr(self, name)}")
        if not 0 <= self.kv_offloading_size < math.inf:
            raise InvalidConfig(f"kv_offloading_size: must not be negative, got {self.kv_offloading_size}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidConfig(f"gpu_memory_utilization: must be in (0, 1], got {self.gpu_memory_utilization}")
