"""Attends on CUDA by FlashAttention, which reads KV from its blocks without gathering."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services.engine.native.attention.attention import Attention, AttentionStep, GatherAttention, store
from services.engine.native.attention.forward import ForwardBatch

_logger = logging.getLogger(__name__)


class VarlenAttention:
    """Calls one kernel per layer for all sequences, prefill chunks and decode tokens alike.

    A layer of the cache is handed over as a strided view. Which block sizes the kernel takes depends on the GPU, so
    ask `choose_cuda_attention` rather than making one.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        """`windows[layer]` is the number of keys that a token sees there, itself included; None: all."""
        # Here and not above: torch's compiler comes along, which takes longer to import than all that a CPU needs.
        from torch.nn.attention.varlen import varlen_attn

        self._windows = tuple(windows)
        self._attend: Callable[..., Tensor | tuple[Tensor, Tensor]] = varlen_attn

    def begin(self, batch: ForwardBatch, kv_cache: Tensor) -> AttentionStep:
        """Put what the layers of one step share on the device."""
        return _VarlenStep(self._windows, self._attend, batch, kv_cache)


class _VarlenStep:
    def __init__(
        self,
        windows: Sequence[int | None],
        attend: Callable[..., Tensor | tuple[Tensor, Tensor]],
        batch: ForwardBatch,
        kv_cache: Tensor,
    ) -> None:
        device, block_size = kv_cache.device, kv_cache.shape[4]
        self._windows = windows
        self._attend = attend
        self._cache = kv_cache
        self._slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        self._block_tables = batch.block_tables
        self._query_start = torch.tensor(batch.query_start, dtype=torch.int32, device=device)
        self._context_lens = torch.tensor(batch.context_lens, dtype=torch.int32, device=device)
        self._max_queries = max(batch.num_queries(b) for b in range(len(batch.context_lens)))
        self._max_context = max(batch.context_lens)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the step's keys and values, each `[T, num_kv_heads, head_dim]`."""
        store(self._cache, layer, self._slots, k, v)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Let each query `[T, num_heads, head_dim]` see its sequence up to itself."""
        window = self._windows[layer]
        keys, values = self._cache[:, layer].unbind(1)  # each [num_blocks, num_kv_heads, block_size, head_dim]
        attended = self._attend(
            q.contiguous(),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            self._query_start,
            None,
            self._max_queries,
            self._max_context,
            window_size=(-1 if window is None else window - 1, 0),  # keys before a query's own, keys after it
            enable_gqa=True,
            seqused_k=self._context_lens,
            block_table=self._block_tables,
        )
        assert isinstance(attended, Tensor)
        return attended


def choose_cuda_attention(windows: Sequence[int | None], kv_cache: Tensor, num_heads: int) -> Attention:
    """Return `VarlenAttention` where it computes what `GatherAttention` does on this device and cache, else the latter.

    It is tried once, at start, on two sequences in a scratch cache of the real block shape: refusals differ between
    GPUs and block sizes, and a kernel that is wrong must not be found out by a user.
    """
    gather, varlen = GatherAttention(windows), VarlenAttention(windows)
    if kv_cache.dtype == torch.float32:
        return gather  # FlashAttention has 16-bit kernels only
    try:
        difference = _largest_difference(gather, varlen, kv_cache, num_heads)
    except (RuntimeError, NotImplementedError) as error:
        _logger.warning("FlashAttention refuses this cache (%s): attention gathers blocks, which is slower", error)
        return gather
    if not difference < 0.05:
        _logger.warning("FlashAttention is off by %g on this cache: attention gathers blocks, slower", difference)
        return gather
    return varlen


@torch.inference_mode()
def _largest_difference(expected: Attention, tried: Attention, kv_cache: Tensor, num_heads: int) -> float:
    """Run layer 0 of one step, a prefill chunk and a decode token, through both."""
    _, _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    device, dtype = kv_cache.device, kv_cache.dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    scratch = normal(5, *kv_cache.shape[1:])
    num_tokens = block_size + 1  # the chunk: the second half of a context of two blocks, and one token to decode
    chunk_blocks, decode_block = (3, 1), 4
    slots = [chunk_blocks[1] * block_size + offset for offset in range(block_size)] + [decode_block * block_size]
    batch = ForwardBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=torch.tensor([*range(block_size, 2 * block_size), block_size], device=device),
        slot_mapping=torch.tensor(slots, device=device),
        query_start=[0, block_size, num_tokens],
        context_lens=[2 * block_size, block_size + 1],
        block_tables=torch.tensor([chunk_blocks, (2, decode_block)], dtype=torch.int32, device=device),
        logits_indices=torch.zeros(0, dtype=torch.int64, device=device),
    )
    q, k, v = normal(num_tokens, num_heads, head_dim), *(normal(num_tokens, num_kv_heads, head_dim) for _ in range(2))
    results = []
    for attention in (expected, tried):
        step = attention.begin(batch, scratch)
        step.append(0, k, v)
        results.append(step.attend(0, q).float())
    return float((results[0] - results[1]).abs().max())
