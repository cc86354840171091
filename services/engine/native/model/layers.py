"""Reads a decoder's weights, layer by layer; whoever computes says what becomes of a projection's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from services.engine.model_config import ModelConfig
from services.engine.native.model.weights import WeightReader

P = TypeVar("P")


@dataclass(frozen=True)
class DecoderLayer(Generic[P]):
    """One layer's weights; projections that read the same input are fused."""

    input_norm: Tensor  # [hidden_size]
    qkv: P  # hidden_size -> (num_heads + 2 * num_kv_heads) * head_dim
    qk_norm: Tensor | None  # [num_heads + num_kv_heads, head_dim]
    o: P
    post_attention_norm: Tensor
    gate_up: P  # hidden_size -> 2 * intermediate_size
    down: P


@dataclass(frozen=True)
class DecoderWeights(Generic[P]):
    """All weights of a model."""

    embedding: Tensor  # [vocab_size, hidden_size]
    layers: Sequence[DecoderLayer[P]]
    norm: Tensor
    lm_head: Tensor  # [vocab_size, hidden_size]; with tied embeddings the embedding


def read_decoder(
    config: ModelConfig, reader: WeightReader, project: Callable[[Tensor, Tensor | None, bool], P]
) -> DecoderWeights[P]:
    """Read a checked checkpoint, one projection at a time.

    `project` gets a projection's weight, its bias, and whether it is the one whose upper half gates the lower.
    """

    def read_layer(prefix: str) -> DecoderLayer[P]:
        def projection(has_bias: bool, *names: str, gated: bool = False) -> P:
            weight = reader.read(*(f"{prefix}{name}.weight" for name in names))
            bias = reader.read(*(f"{prefix}{name}.bias" for name in names)) if has_bias else None
            return project(weight, bias, gated)

        qk_norm = None
        if config.qk_norm:
            q_norm = reader.read(prefix + "self_attn.q_norm.weight").expand(config.num_heads, -1)
            k_norm = reader.read(prefix + "self_attn.k_norm.weight").expand(config.num_kv_heads, -1)
            qk_norm = torch.cat((q_norm, k_norm))
        return DecoderLayer(
            input_norm=reader.read(prefix + "input_layernorm.weight"),
            qkv=projection(config.qkv_bias, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            qk_norm=qk_norm,
            o=projection(config.o_bias, "self_attn.o_proj"),
            post_attention_norm=reader.read(prefix + "post_attention_layernorm.weight"),
            gate_up=projection(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj", gated=True),
            down=projection(config.mlp_bias, "mlp.down_proj"),
        )

    embedding = reader.read("model.embed_tokens.weight")
    layers = [read_layer(f"model.layers.{index}.") for index in range(config.num_layers)]
    norm = reader.read("model.norm.weight")
    lm_head = reader.read("lm_head.weight") if reader.has("lm_head.weight") else embedding
    assert reader.num_left == 0, f"{reader.num_left} tensors were checked but not read"
    return DecoderWeights(embedding, layers, norm, lm_head)
