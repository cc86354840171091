"""Sizes the KV pool and the host tier by the memory that is free once the model is loaded."""

from __future__ import annotations

import torch

from services.engine import capacity
from services.engine.config import EngineConfig
from services.machine import available_memory_bytes
from services.settings import SettingsError


def choose_num_blocks(config: EngineConfig, block_bytes: int, max_model_len: int, device: str) -> int:
    """The number of blocks for the pool. Raises `SettingsError` if not even one request of full length would fit."""
    return capacity.choose_num_blocks(config, block_bytes, max_model_len, _default_bytes(config, device))


def choose_num_host_slots(config: EngineConfig, block_bytes: int, pool_bytes: int, device: str) -> int:
    """The number of blocks in the host tier, 0 for none; the pool will take `pool_bytes`, and has not yet.

    Raises `SettingsError` where the size holds no block, or where there is not so much memory.
    """
    size_bytes = int(config.kv_offloading_size * (1 << 30))
    if not size_bytes:
        return 0
    if size_bytes < block_bytes:
        raise SettingsError(f"kv_offloading_size: {size_bytes} bytes hold no KV block of {block_bytes} bytes")
    free_bytes = available_memory_bytes() - (0 if device.startswith("cuda") else pool_bytes)
    if size_bytes > free_bytes:
        raise SettingsError(
            f"kv_offloading_size: {config.kv_offloading_size:g} GiB asked for, and {max(0, free_bytes) / 2**30:.1f} GiB"
            " of main memory are free beside model and KV pool"
        )
    return size_bytes // block_bytes


def _default_bytes(config: EngineConfig, device: str) -> int:
    if not device.startswith("cuda"):
        return capacity.default_host_bytes(available_memory_bytes())
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return capacity.default_gpu_bytes(free, total, own, config.gpu_memory_utilization)
