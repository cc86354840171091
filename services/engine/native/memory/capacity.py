"""Computes how many KV blocks an engine gets: as the settings say, else a share of free memory."""

from __future__ import annotations

import torch

from services.engine.config import EngineConfig
from services.machine import available_memory_bytes
from services.settings import SettingsError

# On a CPU several workers share one machine, and weights, page cache and other programs need room as well: vLLM's 4 GiB
# at most, and no more than a fifth of what is free.
_MAX_HOST_BYTES = 4 << 30
_HOST_SHARE = 0.2


def choose_num_blocks(config: EngineConfig, block_bytes: int, max_model_len: int, device: str) -> int:
    """The number of blocks for the pool. Raises `SettingsError` if not even one request of full length would fit."""
    blocks_per_request = -(-max_model_len // config.block_size)
    if config.num_gpu_blocks_override:
        num_blocks, origin = config.num_gpu_blocks_override, "num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes:
        num_blocks, origin = config.kv_cache_memory_bytes // block_bytes, "kv_cache_memory_bytes"
    else:
        # More than all requests at full length could use is of use only as a cache: as much again.
        useful = 2 * config.max_num_seqs * blocks_per_request
        num_blocks = min(_default_bytes(config, device) // block_bytes, useful)
        origin = "the memory that is free"
    if num_blocks < blocks_per_request:
        raise SettingsError(
            f"max_model_len: {max_model_len} tokens need {blocks_per_request} KV blocks of {block_bytes} bytes, and "
            f"{origin} gives {num_blocks}; lower max_model_len or raise kv_cache_memory_bytes"
        )
    return num_blocks


def choose_num_host_slots(config: EngineConfig, block_bytes: int, num_blocks: int, device: str) -> int:
    """The number of blocks in the host tier, 0 for none; `num_blocks` are in the pool, whose memory is not taken yet.

    Raises `SettingsError` where the size holds no block, or where there is not so much memory.
    """
    size_bytes = int(config.kv_offloading_size * (1 << 30))
    if not size_bytes:
        return 0
    if size_bytes < block_bytes:
        raise SettingsError(f"kv_offloading_size: {size_bytes} bytes hold no KV block of {block_bytes} bytes")
    free_bytes = available_memory_bytes() - (0 if device.startswith("cuda") else num_blocks * block_bytes)
    if size_bytes > free_bytes:
        raise SettingsError(
            f"kv_offloading_size: {config.kv_offloading_size:g} GiB asked for, and {max(0, free_bytes) / 2**30:.1f} GiB"
            " of main memory are free beside model and KV pool"
        )
    return size_bytes // block_bytes


def _default_bytes(config: EngineConfig, device: str) -> int:
    if not device.startswith("cuda"):
        return min(_MAX_HOST_BYTES, int(_HOST_SHARE * available_memory_bytes()))
    free, total = torch.cuda.mem_get_info(device)
    # The weights are loaded already; what a step allocates must fit into the share that is left out.
    return max(0, int(free - (1 - config.gpu_memory_utilization) * total))
