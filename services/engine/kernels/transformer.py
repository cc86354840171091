"""The model on the C kernels: the arithmetic of `services.engine.transformer`, with fewer passes over the activations.

Bias, residual and activation belong to the projection before them; keys and values are rotated and stored in one call.
A token's results do not depend, in any bit, on how its sequence was cut up, on what else is in the batch, on which
blocks it lies in, or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.forward import ForwardBatch
from services.engine.kernels.library import AppendCall, AttentionCall, Epilogue, KernelLibrary, Workspace
from services.engine.kernels.projection import MAX_INT8_DEPTH, Projection
from services.engine.model_config import ModelConfig, UnsupportedModel
from services.engine.rope import inverse_frequencies
from services.engine.weights import WeightReader

_GATES: Final = {
    "silu": Epilogue.GATE_SILU,
    "swish": Epilogue.GATE_SILU,
    "gelu": Epilogue.GATE_GELU_ERF,
    "gelu_new": Epilogue.GATE_GELU_TANH,
    "gelu_pytorch_tanh": Epilogue.GATE_GELU_TANH,
}
_TOKENS_TOGETHER: Final = 16  # attention reads so many rows of a block at once


@dataclass(frozen=True)
class KernelLayer:
    """One layer's weights, packed."""

    input_norm: Tensor  # [hidden_size]
    qkv: Projection
    qk_norm: Tensor | None  # [num_heads + num_kv_heads, head_dim]
    o: Projection
    post_attention_norm: Tensor
    gate_up: Projection
    down: Projection


class KernelTransformer:
    """The weights as the kernels want them, and one step over them. Used by one thread."""

    def __init__(
        self,
        library: KernelLibrary,
        num_threads: int,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[KernelLayer],
        norm: Tensor,
        lm_head: Projection,
    ) -> None:
        self._library = library
        self._num_threads = num_threads
        self._config = config
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._lm_head = lm_head
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._workspace = Workspace()

    def use_cache(self, kv_cache: Tensor) -> None:
        """Check that the kernels can read this cache. Raises `UnsupportedModel`."""
        block_size = kv_cache.shape[4]
        if block_size % _TOKENS_TOGETHER:
            raise UnsupportedModel(
                f"block_size {block_size} is no multiple of {_TOKENS_TOGETHER}, which the CPU kernels need; "
                "choose another, or set cpu_kernels to torch"
            )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Store the batch's keys and values and return float32 logits `[n, vocab_size]` of the rows it asks for."""
        assert kv_cache.is_contiguous()
        assert kv_cache.dtype == torch.bfloat16
        config = self._config
        x = F.embedding(batch.token_ids, self._embedding)
        step = _Step(self, batch, kv_cache)
        wanted = batch.logits_indices
        inner = torch.empty((len(x), config.intermediate_size), dtype=x.dtype)
        for index, layer in enumerate(self._layers):
            self._multiply(layer.qkv, self._rms_norm(x, layer.input_norm), step.qkv)
            step.append(index, layer.qk_norm)
            if index == len(self._layers) - 1 and len(wanted) == 0:
                return torch.empty((0, config.vocab_size), dtype=torch.float32)
            attended = step.attend(index)
            if index == len(self._layers) - 1:  # from here on, only these rows are of use to anybody
                x, attended = x[wanted], attended[wanted]
            self._multiply(layer.o, attended, x, Epilogue.ADD)
            gated = inner[: len(x)]
            normed = self._rms_norm(x, layer.post_attention_norm)
            self._multiply(layer.gate_up, normed, gated, _GATES[config.hidden_act])
            self._multiply(layer.down, gated, x, Epilogue.ADD)
        logits = torch.empty((len(wanted), config.vocab_size), dtype=torch.float32)
        self._multiply(self._lm_head, self._rms_norm(x, self._norm), logits, Epilogue.WRITE_FLOAT)
        return logits

    def _multiply(self, projection: Projection, x: Tensor, y: Tensor, epilogue: Epilogue = Epilogue.WRITE) -> None:
        projection(x, y, epilogue, self._workspace, self._num_threads)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty_like(x)
        eps = self._config.rms_norm_eps
        num_rows, size = x.shape
        self._library.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), num_rows, size, eps, self._num_threads)
        return y


class _Step:
    """What the layers of one step share: the batch in the arrays that the kernels read, and room for their results."""

    def __init__(self, model: KernelTransformer, batch: ForwardBatch, kv_cache: Tensor) -> None:
        config = model._config
        num_tokens = len(batch.token_ids)
        half = config.head_dim // 2
        self._model = model
        self._cache = kv_cache
        self.qkv = torch.empty(
            (num_tokens, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim), dtype=kv_cache.dtype
        )
        self._attended = torch.empty((num_tokens, config.num_heads * config.head_dim), dtype=kv_cache.dtype)
        # Contiguous and of the very type that the kernels read; kept, because only their addresses go along.
        self._positions = batch.positions.contiguous()
        self._slots = batch.slot_mapping.contiguous()
        self._tables = batch.block_tables.to(torch.int32).contiguous()
        self._query_start = np.array(batch.query_start, dtype=np.int32)
        self._context_lens = np.array(batch.context_lens, dtype=np.int32)
        self._angles = torch.empty((num_tokens, 2, half), dtype=torch.float32)
        model._library.rope_table(
            self._positions.data_ptr(),
            model._frequencies.data_ptr(),
            config.rope.attention_factor,
            num_tokens,
            half,
            self._angles.data_ptr(),
        )
        self._append = AppendCall(
            qkv=self.qkv.data_ptr(),
            table=self._angles.data_ptr(),
            slots=self._slots.data_ptr(),
            block_stride=kv_cache.stride(0),
            num_tokens=num_tokens,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=kv_cache.shape[4],
            eps=config.rms_norm_eps,
        )
        self._attend = AttentionCall(
            q=self.qkv.data_ptr(),
            q_stride=self.qkv.stride(0),
            out=self._attended.data_ptr(),
            block_stride=kv_cache.stride(0),
            block_tables=self._tables.data_ptr(),
            table_stride=self._tables.shape[1],
            query_start=self._query_start.ctypes.data,
            context_lens=self._context_lens.ctypes.data,
            num_sequences=len(batch.context_lens),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=kv_cache.shape[4],
            scale=config.head_dim**-0.5,
        )

    def append(self, layer: int, qk_norm: Tensor | None) -> None:
        """Normalize and rotate what `qkv` holds, in place, and store its keys and values."""
        self._append.cache = self._cache[0, layer].data_ptr()
        self._append.norm = None if qk_norm is None else qk_norm.data_ptr()
        self._model._library.rope_append(self._append, self._model._num_threads)

    def attend(self, layer: int) -> Tensor:
        """Return `[T, num_heads * head_dim]`; overwritten by the next layer's."""
        self._attend.cache = self._cache[0, layer].data_ptr()
        self._attend.window = self._model._config.sliding_windows[layer] or 0
        self._model._library.attention(self._attend, self._model._workspace, self._model._num_threads)
        return self._attended


def read_kernel_transformer(
    library: KernelLibrary, num_threads: int, config: ModelConfig, reader: WeightReader, *, int8: bool
) -> KernelTransformer:
    """Read a checked checkpoint of bfloat16 tensors, one projection at a time: unpacked weights are never all there.

    `int8` quantizes the layers' projections; the output projection stays in bfloat16, as vLLM leaves it.
    """
    deepest = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    if int8 and deepest > MAX_INT8_DEPTH:
        raise UnsupportedModel(f"quantization int8: {deepest} inputs to a projection are more than {MAX_INT8_DEPTH}")

    def read_layer(prefix: str) -> KernelLayer:
        def projection(has_bias: bool, *names: str, gated: bool = False) -> Projection:
            weight = reader.read(*(f"{prefix}{name}.weight" for name in names))
            bias = reader.read(*(f"{prefix}{name}.bias" for name in names)) if has_bias else None
            return Projection(library, weight, bias, int8=int8, gated=gated)

        qk_norm = None
        if config.qk_norm:
            q_norm = reader.read(prefix + "self_attn.q_norm.weight").expand(config.num_heads, -1)
            k_norm = reader.read(prefix + "self_attn.k_norm.weight").expand(config.num_kv_heads, -1)
            qk_norm = torch.cat((q_norm, k_norm))
        return KernelLayer(
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
    return KernelTransformer(library, num_threads, config, embedding, layers, norm, Projection(library, lm_head, None))
