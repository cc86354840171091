"""Computes how many KV blocks an engine gets: as the settings say, else a share of free memory. No torch."""

from __future__ import annotations

from typing import Final

from services.engine.config import EngineConfig
from services.settings import SettingsError

# On a CPU several workers share one machine, and weights, page cache and other programs need room as well: vLLM's 4 GiB
# at most, and no more than a fifth of what is free.
_MAX_HOST_BYTES: Final = 4 << 30
_HOST_SHARE: Final = 0.2

_GPU_HEADROOM: Final = 0.05  # of what is free, for a step, where others have taken more than their share


def default_host_bytes(available_bytes: int) -> int:
    """Return the size of the KV pool on a CPU where no setting gives it. `available_bytes` 0: not known."""
    return min(_MAX_HOST_BYTES, int(_HOST_SHARE * available_bytes)) if available_bytes else _MAX_HOST_BYTES


def default_gpu_bytes(free_bytes: int, total_bytes: int, own_bytes: int, utilization: float) -> int:
    """Return the size of the KV pool on a GPU, of which this process holds `own_bytes`, where no setting gives it.

    A share of the GPU is the process's own, as in vLLM: what another worker beside it has taken does not count against
    it, whoever came first. What a step allocates must fit into what is left out.
    """
    return max(0, int(min(utilization * total_bytes - own_bytes, (1 - _GPU_HEADROOM) * free_bytes)))


def asked_bytes(config: EngineConfig, block_bytes: int) -> int:
    """Return the size of the KV pool as the settings give it, 0 where they leave it to us."""
    return config.num_gpu_blocks_override * block_bytes or config.kv_cache_memory_bytes


def choose_num_blocks(config: EngineConfig, block_bytes: int, max_model_len: int, default_bytes: int) -> int:
    """The number of blocks for the pool. Raises `SettingsError` if not even one request of full length would fit."""
    blocks_per_request = -(-max_model_len // config.block_size)
    if config.num_gpu_blocks_override:
        num_blocks = config.num_gpu_blocks_override
        origin = f"--num-gpu-blocks-override {num_blocks}"
    elif config.kv_cache_memory_bytes:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
        origin = f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes}"
    else:
        # More than all requests at full length could use is of use only as a cache: as much again.
        num_blocks = min(default_bytes // block_bytes, 2 * config.max_num_seqs * blocks_per_request)
        origin = "the memory that is free"
    if num_blocks < blocks_per_request:
        longest = num_blocks * config.block_size
        remedy = f"give --max-model-len {longest} or less" if longest else "a smaller model"
        raise SettingsError(
            f"one request of {max_model_len} tokens (--max-model-len, else the model's context) needs"
            f" {blocks_per_request} KV blocks of {block_bytes} bytes, and {origin} holds {num_blocks};"
            f" {remedy}, or more by --kv-cache-memory-bytes",
            "max_model_len",
        )
    return num_blocks
