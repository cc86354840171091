"""A ragged batch over a paged cache, where all that no sequence owns is NaN, and what attention should give for it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.engine.native.attention.int8_rows import dequantized, quantized
from services.engine.native.kernels.library import AttentionCall, KernelLibrary, Workspace

NUM_LAYERS, LAYER = 2, 1


class PagedCase:
    """Sequences given as (context length after the step, new tokens), with random keys, values and queries."""

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        *,
        num_heads: int = 6,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 16,
        seed: int = 0,
        placement: int = 0,  # another one puts the same sequences into other blocks
        int8: bool = False,  # keys and values are kept in 8 bits; `keys_values` are what these stand for
    ) -> None:
        self.lengths, self.block_size = lengths, block_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        generator = torch.Generator().manual_seed(seed)
        self.keys_values = [
            torch.randn(2, num_kv_heads, context, head_dim, generator=generator).bfloat16() for context, _ in lengths
        ]
        rows = [quantized(each) for each in self.keys_values] if int8 else self.keys_values
        if int8:
            self.keys_values = [dequantized(each, torch.float32) for each in rows]
        queries = [torch.randn(new, num_heads, head_dim, generator=generator).bfloat16() for _, new in lengths]
        # Within wider rows, as the kernels find them in the fused projection.
        self.q = torch.full((sum(new for _, new in lengths), num_heads + 1, head_dim), torch.nan, dtype=torch.bfloat16)
        self.q[:, :num_heads] = torch.cat(queries)

        blocks_of = [-(-context // block_size) for context, _ in lengths]
        free = list(range(sum(blocks_of) + 2))
        random.Random(placement).shuffle(free)
        self.tables = [[free.pop() for _ in range(num_blocks)] for num_blocks in blocks_of]
        shape = (sum(blocks_of) + 2, NUM_LAYERS, 2, num_kv_heads, block_size)
        if int8:  # bytes of which each row's scale is a NaN
            self.cache = torch.full((*shape, head_dim + 4), 0xFF, dtype=torch.uint8)
        else:
            self.cache = torch.full((*shape, head_dim), torch.nan, dtype=torch.bfloat16)
        for stored, table in zip(rows, self.tables, strict=True):
            self.put(table, stored)

    def put(self, table: Sequence[int], rows: Tensor) -> None:
        """Store rows `[2, num_kv_heads, T, ..]`, as the cache has them, in these blocks."""
        for token in range(rows.shape[2]):
            self.cache[table[token // self.block_size], LAYER, :, :, token % self.block_size] = rows[:, :, token]

    def attend(self, library: KernelLibrary, window: int | None = None, num_threads: int = 1) -> Tensor:
        """Return bfloat16 `[T, num_heads, head_dim]`, from a result that was NaN before and a wild block table."""
        width = max(len(table) for table in self.tables) + 1
        tables = np.array([table + [1 << 30] * (width - len(table)) for table in self.tables], dtype=np.int32)
        query_start = np.cumsum([0, *(new for _, new in self.lengths)]).astype(np.int32)
        context_lens = np.array([context for context, _ in self.lengths], dtype=np.int32)
        out = torch.full((len(self.q), self.num_heads, self.head_dim), torch.nan, dtype=torch.bfloat16)
        call = AttentionCall(
            q=self.q.data_ptr(),
            q_stride=self.q.stride(0),
            out=out.data_ptr(),
            cache=self.cache[0, LAYER].data_ptr(),
            block_stride=self.cache.stride(0),
            block_tables=tables.ctypes.data,
            table_stride=width,
            query_start=query_start.ctypes.data,
            context_lens=context_lens.ctypes.data,
            num_sequences=len(self.lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            window=window or 0,
            scale=self.head_dim**-0.5,
            is_int8=self.cache.dtype == torch.uint8,
        )
        library.attention(call, Workspace(), num_threads)
        return out

    def oracle(self, window: int | None = None) -> Tensor:
        """A softmax in float64 over the keys that each query may see."""
        results: list[Tensor] = []
        row = 0
        for stored, (context, new) in zip(self.keys_values, self.lengths, strict=True):
            keys, values = stored.double().repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
            queries = self.q[row : row + new, : self.num_heads].double()
            position, token = torch.arange(context - new, context)[:, None], torch.arange(context)
            hidden = token > position if window is None else (token > position) | (token <= position - window)
            scores = torch.einsum("qhd,htd->hqt", queries, keys) / self.head_dim**0.5
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            results.append(torch.einsum("hqt,htd->qhd", weights, values))
            row += new
        return torch.cat(results)
