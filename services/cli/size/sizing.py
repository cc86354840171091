"""Computes a deployment's memory and bandwidth from a model's configuration. Arithmetic, nothing else.

The bytes of a block are `kvstore.block.layout`'s, so they are what the engine allocates and what travels. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvstore.block import DTYPE_BYTES, BlockLayout
from services.cli.config import SizeConfig
from services.engine.checkpoint import num_parameters
from services.engine.config import DTYPE_ALIASES, EngineConfig, with_device_defaults
from services.engine.model_config import ModelConfig
from services.engine.native_layout import native_layout
from services.machine import Gpu

INDEX_BYTES_PER_BLOCK: Final = 25
"""Redis's memory for a block that one holder has (docs/architecture.md has the measurement)."""
INDEX_BYTES_PER_HOLDER: Final = 8 << 10
STORE_BYTES_PER_BLOCK: Final = 650
"""A tier's bookkeeping, beside the block itself."""
_DEFAULT_DTYPE: Final = "bfloat16"


@dataclass(frozen=True)
class Sizes:
    """The answer. Field names say the unit; what is per worker says so."""

    fits: bool
    """Whether one worker has room for the weights and the KV of one request of full length."""
    weights_fit: bool
    dtype: str
    kv_cache_dtype: str
    context_tokens: int
    block_tokens: int
    kv_bytes_per_token: int
    block_bytes: int
    weight_bytes: int
    draft_weight_bytes: int
    """Of the model that guesses; 0: none does."""
    draft_block_bytes: int
    """Room for its KV beside each block; it does not travel."""
    kv_pool_bytes_per_worker: int
    num_blocks_per_worker: int
    num_tokens_per_worker: int
    max_concurrent_at_context: int
    """Requests of full length that fit into one worker's blocks."""
    max_concurrent_at_prompt: int
    """Requests of the typical prompt's length."""
    max_num_seqs: int
    """Requests in one step of a worker."""
    kv_bytes_for_max_num_seqs: int
    """What `max_num_seqs` requests of full length need."""
    handoff_blocks: int
    handoff_bytes: int
    handoff_seconds: float
    """The bytes over the bandwidth; all but the last chunk's travel while the prompt is computed."""
    max_handoffs_per_s: float
    index_blocks: int
    index_bytes: int
    store_blocks: int
    store_bookkeeping_bytes: int
    store_window_seconds: float
    """How long prompts at the request rate stay in the stores if no block of theirs is shared."""


def size(model: ModelConfig, config: SizeConfig, draft: ModelConfig | None = None) -> Sizes:
    """The sizes of a deployment. Raises `InvalidLayout` for a block size that gives no block."""
    dtype, layout = _dtype(model, config), _layout(model, config)
    draft_weight_bytes = draft_block_bytes = 0
    if draft is not None:
        draft_weight_bytes = num_parameters(draft) * DTYPE_BYTES[_dtype(draft, config)]
        draft_block_bytes = _layout(draft, config).block_bytes
    context = config.max_model_len or model.max_context_len
    weight_bytes = num_parameters(model) * DTYPE_BYTES[dtype]
    budget = int(config.gpu_memory_bytes * config.gpu_memory_utilization) - weight_bytes - draft_weight_bytes
    num_blocks = max(0, config.kv_cache_memory_bytes or budget) // (layout.block_bytes + draft_block_bytes)

    worker = EngineConfig("sized", max_num_seqs=config.max_num_seqs)
    num_seqs = with_device_defaults(worker, Gpu("sized", config.gpu_memory_bytes)).max_num_seqs

    def blocks_of(num_tokens: int) -> int:
        return -(-num_tokens // config.block_size)

    handoff_blocks = blocks_of(config.prompt_tokens)
    handoff_bytes = handoff_blocks * layout.block_bytes
    handoff_s = handoff_bytes * 8 / (config.bandwidth_gbit_per_s * 1e9)
    store_blocks = config.store_dram_bytes // layout.block_bytes
    index_blocks = num_blocks * config.num_workers + store_blocks
    return Sizes(
        fits=budget >= 0 and num_blocks >= blocks_of(context),
        weights_fit=budget >= 0,
        dtype=dtype,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        context_tokens=context,
        block_tokens=config.block_size,
        kv_bytes_per_token=layout.block_bytes // config.block_size,
        block_bytes=layout.block_bytes,
        weight_bytes=weight_bytes,
        draft_weight_bytes=draft_weight_bytes,
        draft_block_bytes=draft_block_bytes,
        kv_pool_bytes_per_worker=num_blocks * (layout.block_bytes + draft_block_bytes),
        num_blocks_per_worker=num_blocks,
        num_tokens_per_worker=num_blocks * config.block_size,
        max_concurrent_at_context=num_blocks // blocks_of(context),
        max_concurrent_at_prompt=num_blocks // handoff_blocks,
        max_num_seqs=num_seqs,
        kv_bytes_for_max_num_seqs=num_seqs * blocks_of(context) * layout.block_bytes,
        handoff_blocks=handoff_blocks,
        handoff_bytes=handoff_bytes,
        handoff_seconds=handoff_s,
        max_handoffs_per_s=1 / handoff_s,
        index_blocks=index_blocks,
        index_bytes=index_blocks * INDEX_BYTES_PER_BLOCK + config.num_workers * INDEX_BYTES_PER_HOLDER,
        store_blocks=store_blocks,
        store_bookkeeping_bytes=store_blocks * STORE_BYTES_PER_BLOCK,
        store_window_seconds=store_blocks / (config.request_rate * handoff_blocks),
    )


def _dtype(model: ModelConfig, config: SizeConfig) -> str:
    return model.dtype or _DEFAULT_DTYPE if config.dtype == "auto" else DTYPE_ALIASES.get(config.dtype, config.dtype)


def _layout(model: ModelConfig, config: SizeConfig) -> BlockLayout:
    return native_layout(model, _dtype(model, config), config.kv_cache_dtype, config.block_size, "sizing")
