"""Attends over paged keys and values: the seam, and its implementation in plain torch for any device.

The cache is `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, key before value. `Attention.begin`
does once per step what all layers share; `append` stores a layer's new keys and values; `attend` reads them. One of
bytes is in 8 bits (`int8_rows`), with rows longer than head_dim.

Values are not masked: a key beyond the context's end weighs exactly 0, so any finite number there is harmless; the
owner of the blocks zeroes them when it hands them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.native.attention.forward import ForwardBatch
from services.engine.native.attention.int8_rows import dequantized, quantized

# Queries of one sequence that attend together. Fewer compute less above the diagonal; 256 keeps a head's scores in L2.
_PIECE = 256
# Decode rows share a call while it gathers no more than this.
_MAX_GATHER_BYTES = 32 << 20


class AttentionStep(Protocol):
    """One step's attention, layer by layer."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the step's keys and values, each `[T, num_kv_heads, head_dim]`, in the blocks of their sequences."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Let each query see its sequence up to itself: `[T, num_heads, head_dim]` to the same shape."""


class Attention(Protocol):
    """Attends as a device does; chosen once, when the cache is made."""

    def begin(self, batch: ForwardBatch, kv_cache: Tensor) -> AttentionStep:
        """Prepare what the layers of one step share."""


def store(kv_cache: Tensor, layer: int, slots: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
    """Write keys and values `[T, num_kv_heads, head_dim]` to `slots`, the block and the offset of each token `[T]`."""
    for which, values in ((0, k), (1, v)):
        by_token = kv_cache[:, layer, which].transpose(1, 2)  # [num_blocks, block_size, num_kv_heads, head_dim]
        rows = quantized(values) if kv_cache.dtype == torch.uint8 else values.to(kv_cache.dtype)
        by_token.index_put_(slots, rows)


class GatherAttention:
    """Gathers the blocks of a context into contiguous keys and values and calls torch's fused attention.

    Decode rows of similar length share one call, with the query heads of a KV head folded into the query axis, so
    that a row's keys are read once. A prefill chunk takes one call per 256 queries, over the keys that these can see.
    Where the cache's dtype is not the queries', gathered keys and values are converted.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        """`windows[layer]` is the number of keys that a token sees there, itself included; None: all."""
        self._windows = tuple(windows)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def begin(self, batch: ForwardBatch, kv_cache: Tensor) -> AttentionStep:
        """Prepare what the layers of one step share."""
        plans = {window: _plan(batch, kv_cache, window) for window in set(self._windows)}
        return _GatherStep(self, batch, kv_cache, [plans[window] for window in self._windows])

    def mask(self, num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return the additive mask `[num_queries, num_keys]` where the last query stands at the last key.

        Every mask is the lower right corner of a larger one, so one is kept per window and grown: at most 256 rows by
        the longest context. With d the number of keys that lie after a query's own, a query in row i (counted from
        the bottom, from 0) must not see the last i keys, nor any key `window` or more before its own.
        """
        assert num_queries <= _PIECE
        if num_queries == 1 and (window is None or num_keys <= window):
            return None
        mask = self._masks.get((window, like.dtype))
        if mask is None or mask.shape[1] < num_keys:
            width = 1 << (max(num_keys, 1024) - 1).bit_length()
            from_right = torch.arange(width - 1, -1, -1, device=like.device)
            from_bottom = torch.arange(_PIECE - 1, -1, -1, device=like.device)
            distance = from_right[None, :] - from_bottom[:, None]  # of a key before the query
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
            self._masks[window, like.dtype] = mask
        return mask[-num_queries:, -num_keys:]


@dataclass(frozen=True)
class _DecodeGroup:
    """Sequences with one new token each and contexts of similar length."""

    rows: Tensor  # int64 [b], of the token axis
    index: Tensor  # int64 [2 * b * num_kv_heads * num_blocks], rows of the cache (see _cache_rows)
    mask: Tensor | None  # [b, 1, 1, num_keys], added to the scores


@dataclass(frozen=True)
class _Chunk:
    """A sequence with several new tokens; keys are numbered from the first gathered one."""

    start: int  # row of the token axis
    num_queries: int
    first_position: int  # of the first query, counted from the first gathered key
    index: Tensor  # int64 [2 * num_kv_heads * num_blocks]
    window: int | None


@dataclass(frozen=True)
class _Plan:
    """The part that all layers with the same window share."""

    groups: list[_DecodeGroup]
    chunks: list[_Chunk]


class _GatherStep:
    def __init__(self, owner: GatherAttention, batch: ForwardBatch, kv_cache: Tensor, plans: Sequence[_Plan]) -> None:
        block_size = kv_cache.shape[4]
        self._owner = owner
        self._cache = kv_cache
        self._plans = plans
        self._slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the step's keys and values, each `[T, num_kv_heads, head_dim]`."""
        store(self._cache, layer, self._slots, k, v)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Let each query `[T, num_heads, head_dim]` see its sequence up to itself."""
        plan = self._plans[layer]
        out = torch.empty_like(q)
        for group in plan.groups:
            out[group.rows] = self._decode(layer, q[group.rows], group)
        for chunk in plan.chunks:
            self._prefill(layer, q, out, chunk)
        return out

    def _gather(self, layer: int, index: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        num_blocks, num_layers, _, num_kv_heads, block_size, width = self._cache.shape
        rows = self._cache.view(num_blocks * num_layers * 2 * num_kv_heads, block_size * width)
        # The index is layer 0's; another layer's rows lie a constant further on.
        gathered = rows[layer * 2 * num_kv_heads :].index_select(0, index).view(2, *shape, -1, width)
        keys, values = dequantized(gathered, dtype) if gathered.dtype == torch.uint8 else gathered.to(dtype)
        return keys, values

    def _decode(self, layer: int, q: Tensor, group: _DecodeGroup) -> Tensor:
        num_rows, num_heads, head_dim = q.shape
        num_kv_heads = self._cache.shape[3]
        k, v = self._gather(layer, group.index, (num_rows, num_kv_heads), q.dtype)
        folded = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
        mask = None if group.mask is None else group.mask.to(q.dtype)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)

    def _prefill(self, layer: int, q: Tensor, out: Tensor, chunk: _Chunk) -> None:
        _, num_heads, head_dim = q.shape
        num_kv_heads = self._cache.shape[3]
        group = num_heads // num_kv_heads
        k, v = self._gather(layer, chunk.index, (num_kv_heads,), q.dtype)  # [num_kv_heads, num_keys, head_dim]
        for start in range(0, chunk.num_queries, _PIECE):
            stop = min(start + _PIECE, chunk.num_queries)
            # keys    first ............... end          the last query of the piece is the key before `end`
            end = chunk.first_position + stop
            first = 0 if chunk.window is None else max(0, chunk.first_position + start - chunk.window + 1)
            rows = slice(chunk.start + start, chunk.start + stop)
            queries = q[rows].view(stop - start, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
            heads = (num_kv_heads, group, end - first, head_dim)
            attended = F.scaled_dot_product_attention(
                queries,
                k[:, None, first:end].expand(heads),
                v[:, None, first:end].expand(heads),
                attn_mask=self._owner.mask(stop - start, end - first, chunk.window, q),
            )
            out[rows] = attended.permute(2, 0, 1, 3).reshape(stop - start, num_heads, head_dim)


def _plan(batch: ForwardBatch, kv_cache: Tensor, window: int | None) -> _Plan:
    """Sort the batch's sequences into decode groups and prefill chunks."""
    block_size = kv_cache.shape[4]
    decode: list[int] = []
    first_blocks: list[int] = []  # per sequence: before it lies nothing that this step can see
    num_blocks: list[int] = []
    chunks: list[_Chunk] = []
    for b, context_len in enumerate(batch.context_lens):
        first_query = context_len - batch.num_queries(b)
        first_blocks.append(0 if window is None else max(0, first_query - window + 1) // block_size)
        num_blocks.append(-(-context_len // block_size) - first_blocks[b])
        if batch.num_queries(b) == 1:
            decode.append(b)
            continue
        blocks = batch.block_tables[b, first_blocks[b] : first_blocks[b] + num_blocks[b]]
        first_position = first_query - first_blocks[b] * block_size
        index = _cache_rows(blocks[None], kv_cache)
        chunks.append(_Chunk(batch.query_start[b], batch.num_queries(b), first_position, index, window))
    block_bytes = 2 * kv_cache[0, 0, 0].numel() * kv_cache.element_size()
    groups = [
        _decode_group(batch, kv_cache, window, [decode[i] for i in members], first_blocks)
        for members in group_by_length([num_blocks[b] for b in decode], max(1, _MAX_GATHER_BYTES // block_bytes))
    ]
    return _Plan(groups, chunks)


def group_by_length(lengths: Sequence[int], max_total: int) -> list[list[int]]:
    """Partition indices into groups that are padded to their longest member without much waste.

    Longest first; a member is at least three quarters of its group's longest, or at most 4 shorter. A group's padded
    total stays within `max_total` unless it has one member.
    """
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        similar = lengths[i] * 4 >= longest * 3 or lengths[i] + 4 >= longest
        if not groups or not similar or longest * (len(groups[-1]) + 1) > max_total:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def _decode_group(
    batch: ForwardBatch, kv_cache: Tensor, window: int | None, members: Sequence[int], first_blocks: Sequence[int]
) -> _DecodeGroup:
    device, block_size = batch.block_tables.device, kv_cache.shape[4]
    context_lens = [batch.context_lens[b] for b in members]
    first = [first_blocks[b] for b in members]
    num_blocks = max(-(-length // block_size) - start for length, start in zip(context_lens, first, strict=True))
    lengths = torch.tensor(context_lens, device=device)[:, None]
    columns = torch.tensor(first, device=device)[:, None] + torch.arange(num_blocks, device=device)
    tables = batch.block_tables[torch.tensor(members, device=device)]
    # A shorter member is filled up with a block of its own: hidden by the mask, and finite, which another's may not be.
    blocks = tables.gather(1, torch.where(columns * block_size < lengths, columns, columns[:, :1]))
    positions = columns[:, :1] * block_size + torch.arange(num_blocks * block_size, device=device)  # [b, num_keys]
    hidden = positions >= lengths
    if window is not None:
        hidden |= positions < lengths - window
    mask = torch.zeros(hidden.shape, dtype=torch.float32, device=device).masked_fill_(hidden, -torch.inf)
    rows = torch.tensor([batch.query_start[b] for b in members], device=device)
    return _DecodeGroup(rows, _cache_rows(blocks, kv_cache), mask[:, None, None, :])


def _cache_rows(blocks: Tensor, kv_cache: Tensor) -> Tensor:
    """Return which rows of the cache, seen as `[-1, block_size * head_dim]`, hold layer 0 of `[b, num_blocks]` blocks.

    In the order key/value, b, KV head, block, so that gathered rows are `[2, b, num_kv_heads, num_keys, head_dim]`.
    """
    _, num_layers, _, num_kv_heads, _, _ = kv_cache.shape
    heads = torch.arange(2 * num_kv_heads, device=blocks.device).view(2, 1, num_kv_heads, 1)
    return (blocks.to(torch.int64)[None, :, None, :] * (num_layers * 2 * num_kv_heads) + heads).flatten()
