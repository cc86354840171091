"""What vLLM says of its cache, in the words of a layout, and how it writes to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec

from kvstore.block import BlockLayout
from services.engine.foreign import Kept, RankCache, scales_digest
from services.engine.model_config import UnsupportedModel
from services.engine.refused import ALL_WINDOWS


def read_group(config: KVCacheConfig, cache_layout: str) -> Kept:
    """Return what the model keeps, by vLLM's name of the order (`LBHNC`).

    Raises `UnsupportedModel` for what is not full attention alone.
    """
    groups = config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if kinds == ["SlidingWindowSpec"]:
        raise UnsupportedModel(ALL_WINDOWS)
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise UnsupportedModel(
            f"its layers keep {len(groups)} kinds of state ({', '.join(kinds) or 'none'}), and a block holds the keys"
            " and values of one: models of recurrent layers among others are not handed over"
        )
    spec = groups[0].kv_cache_spec
    if spec.tokens_per_state != 1 or spec.page_size_padded or spec.num_head_slots or spec.state_content_bytes:
        raise UnsupportedModel(f"its cache is packed in a way that we do not know: {spec!r:.300}")
    num_vectors = 1 if isinstance(spec, MLAAttentionSpec) else 2
    if num_vectors == 2 and spec.head_size_v != spec.head_size:
        raise UnsupportedModel(f"its keys have {spec.head_size} numbers, its values {spec.head_size_v}")
    return Kept(
        num_layers=len(groups[0].layer_names),
        num_kv_heads=int(spec.num_kv_heads),
        block_size=int(spec.block_size),
        num_vectors=num_vectors,
        head_dim=int(spec.head_size),
        dtype=spec.dtype,
        is_head_major=spec.num_kv_heads == 1 or cache_layout.index("H") < cache_layout.index("N"),
    )


def rank_cache(config: VllmConfig, layers: Mapping[str, Any], packing: str) -> RankCache:
    """Say of this rank what is to be equal on all."""
    layer = next(iter(layers.values()))
    scales = [(float(each._k_scale_float), float(each._v_scale_float)) for each in layers.values()]
    return RankCache(
        packing=packing,
        isa=str(getattr(layer, "isa", getattr(layer.impl, "isa", ""))),
        scales=scales_digest(scales) if config.cache_config.cache_dtype.startswith("fp8") else "",
        attention_backend=str(layer.get_attn_backend().get_name()),
        is_batch_invariant=bool(envs.VLLM_BATCH_INVARIANT)
        and all(each.get_attn_backend().supports_batch_invariance() for each in layers.values()),
    )


def block_layout(
    config: VllmConfig, kept: Kept, num_shares: int, said: RankCache, fingerprint: str, proof_key: str
) -> BlockLayout:
    """Declare the layout, of all heads, which `num_shares` ranks have among them."""
    return BlockLayout(
        num_layers=kept.num_layers,
        num_kv_heads=kept.num_kv_heads * num_shares,
        block_size=kept.block_size,
        head_dim=kept.head_dim,
        dtype=str(kept.dtype).removeprefix("torch."),
        model_fingerprint=fingerprint,
        proof_key=proof_key,
        engine="vllm",
        kernel_layout=f"{config.cache_config.kv_cache_layout.replace('B', '')}/{said.packing}",
        isa=said.isa,
        scales=said.scales,
        attention_backend=said.attention_backend,
        num_vectors=kept.num_vectors,
    )


def write(cache: Tensor, layer: Any, kept: Kept, values: Tensor, slots: Tensor) -> None:
    """Have a layer's kernel write keys and values, `[tokens, heads, vectors * head_dim]`, to places of its cache."""
    if kept.num_vectors == 1:
        latent, rope = values[:, 0, : layer.kv_lora_rank], values[:, :, layer.kv_lora_rank :]
        dtype, scale, rows = layer.kv_cache_dtype, layer._k_scale, cache.squeeze(1)  # without its one head's axis
        layer.impl.do_kv_cache_update(latent.contiguous(), rope.contiguous(), rows, slots, dtype, scale)
        return
    key, value = values.chunk(2, dim=2)
    layer.impl.do_kv_cache_update(layer, key.contiguous(), value.contiguous(), cache, slots)
