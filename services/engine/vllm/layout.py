"""Where vLLM keeps keys and values, and what a block of them is: declared from its own words, then tried out.

A block lies in one piece per layer, or in one where vLLM's layout has its layers side by side; which of the two, the
strides of its caches say. What the bytes mean is another matter: the kernels may pack them as they like. So `probe`
writes known keys and values through the engine's own path and looks for them in our rows, and what it finds there goes
into the layout, by which peers know each other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec

from kvstore.block import BlockLayout
from services.engine.model_config import ModelError, UnsupportedModel

# Of the blocks that the probe writes to: through the engine, by our rows, through the engine again.
_WRITTEN, _COPIED, _AGAIN = 1, 2, 3
NUM_PROBED: Final = 4


@dataclass(frozen=True)
class Kept:
    """One cache group, as vLLM describes it."""

    spec: FullAttentionSpec
    num_layers: int
    num_vectors: int  # per token, layer and head
    head_dim: int
    is_head_major: bool


@dataclass(frozen=True)
class RankCache:
    """What a rank says of its cache; equal on all ranks."""

    packing: str
    """What `probe` returned."""
    isa: str
    scales: str
    attention_backend: str
    is_batch_invariant: bool


def read_group(config: KVCacheConfig, cache_layout: str) -> Kept:
    """Return what the model keeps, by vLLM's name of the order (`LBHNC`).

    Raises `UnsupportedModel` for what is not full attention alone.
    """
    groups = config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if kinds == ["SlidingWindowSpec"]:
        raise UnsupportedModel(
            "all its layers have a sliding window, and vLLM drops the blocks behind it; up to the window's length"
            """ --hf-overrides '{"sliding_window":null}' --max-model-len (that length) computes the same"""
        )
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
    is_head_major = spec.num_kv_heads == 1 or cache_layout.index("H") < cache_layout.index("N")
    return Kept(spec, len(groups[0].layer_names), num_vectors, spec.head_size, is_head_major)


def byte_view(caches: Mapping[str, Tensor], num_blocks: int, *, joins_layers: bool) -> Tensor:
    """View vLLM's caches as bytes, uint8 `[num_pieces, num_blocks, piece_bytes]`, without copying any.

    `joins_layers`: layers side by side are one piece, as they may be where no other rank's come between them. Raises
    `ModelError` where they are not as we think.
    """
    tensors = sorted(caches.values(), key=Tensor.data_ptr)
    first, storage = tensors[0], tensors[0].untyped_storage()
    piece_bytes, block_stride = first[0].numel() * first.element_size(), first.stride(0) * first.element_size()
    offsets = [tensor.data_ptr() - first.data_ptr() for tensor in tensors]
    layer_stride = offsets[1] if len(tensors) > 1 else piece_bytes
    problem = None
    if any(tensor.untyped_storage().data_ptr() != storage.data_ptr() for tensor in tensors):
        problem = "layers lie in several allocations"
    elif any(tensor.shape != first.shape or tensor.stride() != first.stride() for tensor in tensors):
        problem = "layers differ in shape"
    elif first.shape[0] != num_blocks:
        problem = f"a cache has {first.shape[0]} blocks, the scheduler {num_blocks}"
    elif not _is_dense(first[0]):
        problem = f"a layer's block is not one piece: {tuple(first.shape)} with strides {first.stride()}"
    elif offsets != [index * layer_stride for index in range(len(tensors))]:
        problem = "layers are not evenly spaced"
    if problem is not None:
        raise ModelError(f"vLLM's cache is not laid out as we know it: {problem}")
    num_pieces = len(tensors)
    if layer_stride == piece_bytes and joins_layers:
        piece_bytes, num_pieces = num_pieces * piece_bytes, 1
    raw = torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage)  # type: ignore[call-overload]
    begin = first.data_ptr() - storage.data_ptr()
    return raw.as_strided((num_pieces, num_blocks, piece_bytes), (layer_stride, block_stride, 1), begin)


def rank_cache(config: VllmConfig, layers: Mapping[str, Any], packing: str) -> RankCache:
    """Say it of this rank."""
    layer = next(iter(layers.values()))
    return RankCache(
        packing=packing,
        isa=str(getattr(layer, "isa", getattr(layer.impl, "isa", ""))),
        scales=_scales(layers) if config.cache_config.cache_dtype.startswith("fp8") else "",
        attention_backend=str(layer.get_attn_backend().get_name()),
        is_batch_invariant=bool(envs.VLLM_BATCH_INVARIANT)
        and all(each.get_attn_backend().supports_batch_invariance() for each in layers.values()),
    )


def num_holders(config: VllmConfig, kept: Kept) -> int:
    """Return how many ranks have each head. Raises `UnsupportedModel` where their parts do not make up a block."""
    num_ranks, num_heads = int(config.parallel_config.tensor_parallel_size), int(kept.spec.num_kv_heads)
    if num_ranks == 1:
        return 1
    if not kept.is_head_major:
        raise UnsupportedModel(
            f"vLLM keeps its cache as {config.cache_config.kv_cache_layout}, tokens before heads, of which"
            f" {num_ranks} ranks' parts are no block's neighbours: --tensor-parallel-size 1 alone"
        )
    total = 1 if kept.num_vectors == 1 else int(config.model_config.get_total_num_kv_heads())
    if total % num_heads or num_ranks % (total // num_heads):
        raise UnsupportedModel(f"its {total} KV heads are not divided evenly among {num_ranks} ranks")
    return num_ranks // (total // num_heads)


def block_layout(
    config: VllmConfig, kept: Kept, num_shares: int, said: RankCache, fingerprint: str, proof_key: str
) -> BlockLayout:
    """Declare the layout, of all heads, which `num_shares` ranks have among them."""
    return BlockLayout(
        num_layers=kept.num_layers,
        num_kv_heads=kept.spec.num_kv_heads * num_shares,
        block_size=config.cache_config.block_size,
        head_dim=kept.head_dim,
        dtype=str(kept.spec.dtype).removeprefix("torch."),
        model_fingerprint=fingerprint,
        proof_key=proof_key,
        engine="vllm",
        kernel_layout=f"{config.cache_config.kv_cache_layout.replace('B', '')}/{said.packing}",
        isa=said.isa,
        scales=said.scales,
        attention_backend=said.attention_backend,
        num_vectors=kept.num_vectors,
    )


def probe(view: Tensor, caches: Mapping[str, Tensor], layers: Mapping[str, Any], kept: Kept) -> str:
    """Write known keys and values through the engine's own path, and look for them in our rows.

    Returns 16 hex digits that two workers share exactly where their kernels pack alike, however many heads each rank
    has. Raises `ModelError` where a block is not what and where we think it is. To be called before anything is cached.
    """
    blocks = view[:, :NUM_PROBED]
    before = blocks.clone()
    for index, (name, layer) in enumerate(layers.items()):
        _write(caches[name], layer, kept, _WRITTEN, seed=index)
    written = blocks[:, _WRITTEN].clone()
    if any(not torch.equal(blocks[:, other], before[:, other]) for other in (0, _COPIED, _AGAIN)):
        raise ModelError("probe: what was written to one block of vLLM's cache appeared in another of ours")
    num_parts = len(layers) * (kept.spec.num_kv_heads if kept.is_head_major else 1)
    parts = written.reshape(num_parts, -1)
    if kept.spec.dtype.itemsize in _WORDS:
        known = torch.stack([_known(kept, index, view).transpose(0, 1) for index in range(len(layers))])
        _find_all(parts, known.reshape(num_parts, -1))
    blocks[:, _COPIED] = written
    for index, (name, layer) in enumerate(layers.items()):
        _write(caches[name], layer, kept, _AGAIN, seed=index)
    if not torch.equal(blocks[:, _AGAIN], blocks[:, _COPIED]):
        raise ModelError("probe: the same keys and values have other bytes in another block of vLLM's cache")
    blocks.copy_(before)
    first_heads = parts[:: num_parts // len(layers)].cpu().numpy()
    return hashlib.blake2b(first_heads.tobytes(), digest_size=8, person=b"tandem.probe").hexdigest()


def _write(cache: Tensor, layer: Any, kept: Kept, block_id: int, seed: int) -> None:
    values, size = _known(kept, seed, cache), kept.spec.block_size
    slots = torch.arange(block_id * size, (block_id + 1) * size, dtype=torch.int64, device=cache.device)
    if kept.num_vectors == 1:
        latent, rope = values[:, 0, : layer.kv_lora_rank], values[:, :, layer.kv_lora_rank :]
        dtype, scale = layer.kv_cache_dtype, layer._k_scale
        layer.impl.do_kv_cache_update(latent.contiguous(), rope.contiguous(), cache, slots, dtype, scale)
        return
    key, value = values.chunk(2, dim=2)
    layer.impl.do_kv_cache_update(layer, key.contiguous(), value.contiguous(), cache, slots)


def _known(kept: Kept, seed: int, like: Tensor) -> Tensor:
    """Keys and values of one layer's block, `[block_size, num_kv_heads, num_vectors * head_dim]`.

    As unlike as numbers can be that each element type holds exactly: seven bits of a fraction, some exponents.
    """
    shape = (kept.spec.num_kv_heads, kept.spec.block_size, kept.num_vectors * kept.head_dim)
    numbers = torch.arange(math.prod(shape), dtype=torch.int64) * 2654435761 + 40503 * seed
    values = (numbers % 128 + 128).to(torch.float32) * torch.exp2((numbers >> 7) % 12 - 12.0)
    dtype = torch.get_default_dtype() if kept.spec.dtype.itemsize < 2 else kept.spec.dtype
    return values.reshape(shape).transpose(0, 1).to(like.device, dtype)


def _find_all(written: Tensor, values: Tensor) -> None:
    """Raise unless each part of a block, a row, has exactly the elements that were written, in whatever order."""
    words = _WORDS[values.element_size()]
    found, expected = (each.contiguous().view(words).sort(dim=1).values for each in (written, values))
    if not torch.equal(found, expected):
        raise ModelError("probe: a block of ours does not hold the keys and values that vLLM wrote to it")


_WORDS: Final = {2: torch.int16, 4: torch.int32}  # by element size


def _is_dense(block: Tensor) -> bool:
    strides = block.stride()
    order = sorted(range(block.dim()), key=lambda axis: -strides[axis])
    return block.permute(order).is_contiguous()


def _scales(layers: Mapping[str, Any]) -> str:
    numbers = [(float(layer._k_scale_float), float(layer._v_scale_float)) for layer in layers.values()]
    return hashlib.blake2b(repr(numbers).encode(), digest_size=8).hexdigest()
