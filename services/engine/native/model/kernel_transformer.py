"""Runs the model on the C kernels: the arithmetic of `transformer` in fewer passes over the activations.

Bias, residual and activation belong to the projection before them; keys and values are rotated and stored in one pass.
A step is one call of the library, all layers. No bit of a token's results depends on how its sequence was cut up, on
the rest of the batch, on its blocks, or on the number of threads.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from services.engine.model_config import ModelConfig, UnsupportedModel
from services.engine.native.attention import ForwardBatch
from services.engine.native.kernels import (
    AppendCall,
    AttentionCall,
    Epilogue,
    ForwardCall,
    KernelLibrary,
    Layer,
    Stage,
    Workspace,
)
from services.engine.native.model.layers import DecoderLayer, read_decoder
from services.engine.native.model.projection import MAX_INT8_DEPTH, Projection
from services.engine.native.model.rope import inverse_frequencies
from services.engine.native.model.weights import WeightReader

_GATES: Final = {
    "silu": Epilogue.GATE_SILU,
    "swish": Epilogue.GATE_SILU,
    "gelu": Epilogue.GATE_GELU_ERF,
    "gelu_new": Epilogue.GATE_GELU_TANH,
    "gelu_pytorch_tanh": Epilogue.GATE_GELU_TANH,
}
_UNSIGNED: Final[dict[int, type[np.unsignedinteger]]] = {4: np.uint32, 8: np.uint64}
_TOKENS_TOGETHER: Final = 16  # attention reads so many rows of a block at once


class KernelTransformer:
    """The weights as the kernels want them, and one step over them. Used by one thread."""

    def __init__(
        self, library: KernelLibrary, num_threads: int, config: ModelConfig, reader: WeightReader, *, int8: bool
    ) -> None:
        """Read a checked checkpoint of bfloat16 tensors; its unpacked weights are never all there.

        `int8` quantizes the layers' projections; the output projection stays in bfloat16, as vLLM leaves it.
        """
        deepest = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        if int8 and deepest > MAX_INT8_DEPTH:
            raise UnsupportedModel(
                f"quantization int8: {deepest} inputs to a projection are more than {MAX_INT8_DEPTH}"
            )
        weights = read_decoder(
            config,
            reader,
            lambda weight, bias, gated: Projection(library, weight, bias, int8=int8, gated=gated),
        )
        self._library = library
        self._num_threads = num_threads
        self._config = config
        self._embedding, self._layers, self._norm = weights.embedding, weights.layers, weights.norm
        self._lm_head = Projection(library, weights.lm_head, None)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._layer_structs = (Layer * config.num_layers)(
            *(_struct(layer, window) for layer, window in zip(self._layers, config.sliding_windows, strict=True))
        )
        self._workspace = Workspace()
        self._activations = _Activations(config, 0)
        self._call = self._new_call()
        weakref.finalize(self, library.wait_for_helpers)  # before the weights are freed

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
        assert kv_cache.dtype in (torch.bfloat16, torch.uint8), "in 8 bits it is rows of bytes"
        num_tokens = len(batch.token_ids)
        if num_tokens > len(self._activations.x):
            self._activations = _Activations(self._config, num_tokens)
            _point_at(self._call, self._activations)
        inputs = _Inputs(batch)
        inputs.check(len(self._embedding), kv_cache)
        logits = torch.empty((len(inputs.wanted), self._config.vocab_size), dtype=torch.float32)
        self._fill_in(inputs, kv_cache, logits)
        self._library.forward(self._call, self._workspace, self._num_threads)
        return logits

    def _new_call(self) -> ForwardCall:
        """What is the same at every step; its seconds add up. What it points to must outlive it."""
        config = self._config
        call = ForwardCall(
            layers=ctypes.addressof(self._layer_structs),
            lm_head=ctypes.addressof(self._lm_head.weights),
            embedding=self._embedding.data_ptr(),
            norm=self._norm.data_ptr(),
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            gate=_GATES[config.hidden_act],
            frequencies=self._frequencies.data_ptr(),
            rope_factor=config.rope.attention_factor,
            append=AppendCall(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                eps=config.rms_norm_eps,
            ),
            attention=AttentionCall(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                scale=config.head_dim**-0.5,
            ),
        )
        _point_at(call, self._activations)
        return call

    def _fill_in(self, inputs: _Inputs, kv_cache: Tensor, logits: Tensor) -> None:
        """Put a step into the call, in the addresses that the library takes; what they point to must outlive it."""
        call, append, attention = self._call, self._call.append, self._call.attention
        block_stride, layer_stride, *_ = kv_cache.stride()
        call.layer_stride = layer_stride * kv_cache.itemsize
        call.token_ids = inputs.token_ids.data_ptr()
        call.positions = inputs.positions.data_ptr()
        call.wanted = inputs.wanted.data_ptr()
        call.num_wanted = inputs.wanted.shape[0]
        call.logits = logits.data_ptr()
        append.slots = inputs.slots.data_ptr()
        append.cache = kv_cache.data_ptr()
        append.num_tokens = inputs.token_ids.shape[0]
        append.block_stride = attention.block_stride = block_stride
        append.is_int8 = attention.is_int8 = kv_cache.dtype == torch.uint8
        append.block_size = attention.block_size = kv_cache.shape[4]
        attention.block_tables = inputs.tables.data_ptr()
        attention.table_stride = inputs.tables.shape[1]
        attention.query_start = inputs.query_start.ctypes.data
        attention.context_lens = inputs.context_lens.ctypes.data
        attention.num_sequences = inputs.context_lens.size

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Returns the seconds of all steps so far, by stage."""
        return {stage.name.lower(): self._call.seconds[stage] for stage in Stage}


def _point_at(call: ForwardCall, room: _Activations) -> None:
    """Have a call work in `room`, which must outlive it."""
    call.x, call.normed, call.gated = room.x.data_ptr(), room.normed.data_ptr(), room.gated.data_ptr()
    call.angles = call.append.table = room.angles.data_ptr()
    call.append.qkv = call.attention.q = room.qkv.data_ptr()
    call.attention.q_stride = room.qkv.stride(0)
    call.attention.out = room.attended.data_ptr()


class _Inputs:
    """A batch in arrays that are contiguous and of the very types that the kernels read."""

    def __init__(self, batch: ForwardBatch) -> None:
        self.token_ids = batch.token_ids.contiguous()
        self.positions = batch.positions.contiguous()
        self.slots = batch.slot_mapping.contiguous()
        self.wanted = batch.logits_indices.contiguous()
        self.tables = batch.block_tables.to(torch.int32).contiguous()
        self.query_start = np.array(batch.query_start, dtype=np.int32)
        self.context_lens = np.array(batch.context_lens, dtype=np.int32)

    def check(self, vocab_size: int, kv_cache: Tensor) -> None:
        """Raise `IndexError` for what C would read or write beyond an array."""
        assert self.positions.dtype == torch.int64, self.positions.dtype
        _check_below("token id", self.token_ids, vocab_size)
        _check_below("slot", self.slots, kv_cache.shape[0] * kv_cache.shape[4])
        _check_below("block id", self.tables, kv_cache.shape[0])
        _check_below("row of logits", self.wanted, len(self.token_ids))
        wanted = self.wanted.numpy()
        if not (wanted[1:] > wanted[:-1]).all():
            raise IndexError("rows of logits must ascend")


class _Activations:
    """Room for what a layer hands on, a row for each token; the next layer overwrites it.

    Kept from step to step: memory that is fresh from the system costs a page fault for each 4 KiB.
    """

    def __init__(self, config: ModelConfig, num_tokens: int) -> None:
        def room(width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty((num_tokens, width), dtype=dtype)

        self.x = room(config.hidden_size)
        self.normed = room(config.hidden_size)
        self.qkv = room((config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        self.attended = room(config.num_heads * config.head_dim)
        self.gated = room(config.intermediate_size)
        self.angles = room(config.head_dim, torch.float32)


def _check_below(what: str, indices: Tensor, end: int) -> None:
    """Raise `IndexError` for an index that is not. `indices` int64, tables of blocks int32."""
    assert indices.dtype == (torch.int32 if indices.dim() == 2 else torch.int64), (what, indices.dtype)
    values = indices.numpy()
    # Read as unsigned numbers, negative ones are the largest.
    if values.size and values.view(_UNSIGNED[values.itemsize]).max() >= end:
        raise IndexError(f"a {what} is not below {end}: {int(values.min())} to {int(values.max())}")


def _struct(layer: DecoderLayer[Projection], window: int | None) -> Layer:
    """Return what points to the layer's weights; `layer` must outlive it."""
    return Layer(
        qkv=layer.qkv.weights,
        o=layer.o.weights,
        gate_up=layer.gate_up.weights,
        down=layer.down.weights,
        input_norm=layer.input_norm.data_ptr(),
        post_attention_norm=layer.post_attention_norm.data_ptr(),
        qk_norm=None if layer.qk_norm is None else layer.qk_norm.data_ptr(),
        window=window or 0,
    )
