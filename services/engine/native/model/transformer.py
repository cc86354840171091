"""Computes the model: embedding, layers, output projection. Prefill and decode are one code path.

Linear and attention are the two seams; what lies between them is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.model_config import ModelConfig
from services.engine.native.attention import Attention, AttentionStep, ForwardBatch, GatherAttention
from services.engine.native.model.linear import Linear, make_linear
from services.engine.native.model.rope import cos_sin, inverse_frequencies, rotate
from services.engine.native.model.weights import WeightReader

_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Layer:
    """One layer's weights; projections that read the same input are fused."""

    input_norm: Tensor  # [hidden_size]
    qkv: Linear  # hidden_size -> (num_heads + 2 * num_kv_heads) * head_dim
    qk_norm: Tensor | None  # [num_heads + num_kv_heads, head_dim]
    o: Linear
    post_attention_norm: Tensor
    gate_up: Linear  # hidden_size -> 2 * intermediate_size
    down: Linear


class Transformer:
    """The weights in compute dtype, and the arithmetic of one step over them. Made by `read_transformer`."""

    def __init__(
        self, config: ModelConfig, embedding: Tensor, layers: Sequence[Layer], norm: Tensor, lm_head: Linear
    ) -> None:
        self.config = config
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._lm_head = lm_head
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(embedding.device)
        self._attention: Attention = GatherAttention(config.sliding_windows)

    def use_cache(self, kv_cache: Tensor) -> None:
        """Choose the attention that is fastest for this cache's device and block size."""
        if kv_cache.is_cuda:
            from services.engine.native.attention import choose_cuda_attention  # CUDA builds of torch

            self._attention = choose_cuda_attention(self.config.sliding_windows, kv_cache, self.config.num_heads)

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Returns nothing: a GPU's work is done after the call that asked for it."""
        return {}

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Store the batch's keys and values and return float32 logits `[n, vocab_size]` of the rows it asks for."""
        x = F.embedding(batch.token_ids, self._embedding)
        rope = self.config.rope
        cos, sin = cos_sin(batch.positions, self._frequencies, rope.attention_factor, x.dtype)
        step = self._attention.begin(batch, kv_cache)
        wanted = batch.logits_indices
        for index, layer in enumerate(self._layers):
            q = self._project(index, layer, x, cos, sin, step)
            if index == len(self._layers) - 1 and wanted.shape[0] == 0:
                return torch.empty((0, self.config.vocab_size), dtype=torch.float32, device=x.device)
            attended = step.attend(index, q).flatten(1)
            if index == len(self._layers) - 1:  # from here on, only these rows are of use to anybody
                x, attended = x[wanted], attended[wanted]
            x = x + layer.o(attended)
            x = x + self._mlp(layer, self._rms_norm(x, layer.post_attention_norm))
        return self._lm_head(self._rms_norm(x, self._norm)).float()

    def _project(self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, step: AttentionStep) -> Tensor:
        """Store the layer's keys and values and return its queries `[T, num_heads, head_dim]`."""
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        heads = layer.qkv(self._rms_norm(x, layer.input_norm)).view(len(x), -1, config.head_dim)
        rotated, v = heads[:, :num_rotated], heads[:, num_rotated:]
        if layer.qk_norm is not None:
            rotated = self._rms_norm(rotated, layer.qk_norm)
        rotated = rotate(rotated, cos, sin)
        step.append(index, rotated[:, config.num_heads :], v)
        return rotated[:, : config.num_heads]

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        return layer.down(_ACTIVATIONS[self.config.hidden_act](gate) * up)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Normalize the last dimension in float32, round, then scale: the order that `transformers` rounds in."""
        eps = self.config.rms_norm_eps
        if x.is_cuda:  # one kernel
            return weight * F.rms_norm(x, x.shape[-1:], None, eps)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        return weight * y.to(x.dtype)


def read_transformer(config: ModelConfig, reader: WeightReader) -> Transformer:
    """Read a checked checkpoint. With tied embeddings the output projection is the embedding, packed if that helps."""
    embedding = reader.read("model.embed_tokens.weight")
    layers = [_read_layer(config, reader, f"model.layers.{index}.") for index in range(config.num_layers)]
    norm = reader.read("model.norm.weight")
    lm_head = reader.read("lm_head.weight") if reader.has("lm_head.weight") else embedding
    assert reader.num_left == 0, f"{reader.num_left} tensors were checked but not read"
    return Transformer(config, embedding, layers, norm, make_linear(lm_head, None))


def _read_layer(config: ModelConfig, reader: WeightReader, prefix: str) -> Layer:
    def linear(has_bias: bool, *names: str) -> Linear:
        weight = reader.read(*(f"{prefix}{name}.weight" for name in names))
        bias = reader.read(*(f"{prefix}{name}.bias" for name in names)) if has_bias else None
        return make_linear(weight, bias)

    qk_norm = None
    if config.qk_norm:
        q_norm = reader.read(prefix + "self_attn.q_norm.weight").expand(config.num_heads, -1)
        k_norm = reader.read(prefix + "self_attn.k_norm.weight").expand(config.num_kv_heads, -1)
        qk_norm = torch.cat((q_norm, k_norm))
    return Layer(
        input_norm=reader.read(prefix + "input_layernorm.weight"),
        qkv=linear(config.qkv_bias, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        qk_norm=qk_norm,
        o=linear(config.o_bias, "self_attn.o_proj"),
        post_attention_norm=reader.read(prefix + "post_attention_layernorm.weight"),
        gate_up=linear(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
        down=linear(config.mlp_bias, "mlp.down_proj"),
    )
