"""Computes the model: embedding, layers, output projection. Prefill and decode are one code path.

Linear and attention are the two seams; what lies between them is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.model_config import ModelConfig
from services.engine.native.attention import Attention, AttentionStep, ForwardBatch, GatherAttention
from services.engine.native.model.layers import DecoderLayer, read_decoder
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


class Transformer:
    """The weights in compute dtype, and the arithmetic of one step over them."""

    def __init__(self, config: ModelConfig, reader: WeightReader) -> None:
        """Read a checked checkpoint; tied embeddings are packed a second time, as output projection, if that helps."""
        weights = read_decoder(config, reader, lambda weight, bias, gated: make_linear(weight, bias))
        self.config = config
        self._embedding, self._layers, self._norm = weights.embedding, weights.layers, weights.norm
        self._lm_head = make_linear(weights.lm_head, None)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self._embedding.device)
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

    def _project(
        self, index: int, layer: DecoderLayer[Linear], x: Tensor, cos: Tensor, sin: Tensor, step: AttentionStep
    ) -> Tensor:
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

    def _mlp(self, layer: DecoderLayer[Linear], x: Tensor) -> Tensor:
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
