"""Checks a library on this machine: a few milliseconds at start, before the first token.

Sums of small whole numbers are exact in float32 in any order, so projections must agree to the bit with numpy;
attention must agree with a softmax in float64 as far as bfloat16 goes.

    python -m services.engine.native.kernels.self_check LIBRARY        exit status 0: it does
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.engine.native.kernels.library import (
    PANEL_COLUMNS,
    AttentionCall,
    Epilogue,
    KernelError,
    KernelLibrary,
    Weights,
    Workspace,
)

_TOLERANCE = 0.02  # attention: weights and output are rounded to bfloat16, of values up to about 3
_NUM_ROWS = (1, 7, 37)  # one row, part of a panel, and a whole panel with a rest


def check(library: KernelLibrary) -> None:
    """Raise `KernelError` saying what came out wrong."""
    for num_rows in _NUM_ROWS:
        for int8 in (False, True):
            if not _projection_is_exact(library, num_rows, int8):
                kind = "an int8" if int8 else "a bfloat16"
                raise KernelError(f"{library.name} gives a wrong product of {num_rows} rows and {kind} matrix")
    for window in (0, 40):
        for int8 in (False, True):
            difference = _attention_difference(library, window, int8)
            if not difference < _TOLERANCE:
                kept = ", keys and values in 8 bits," if int8 else ""
                raise KernelError(f"{library.name} is off by {difference:.3g} in attention{kept} with window {window}")


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bits of `values` cut to bfloat16."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return the values of bfloat16 `bits`."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _projection_is_exact(library: KernelLibrary, num_rows: int, int8: bool) -> bool:
    depth, num_outputs = 601, 41  # neither is a whole block; weights of either type are taken in several chunks
    random = np.random.default_rng(num_rows)
    matrix = random.integers(-9, 10, (num_outputs, depth))
    x = random.integers(-9, 10, (num_rows, depth))
    x[:, 0] = 127  # the largest of each row, so that int8 activations have the scale 1
    order = np.full(-(-num_outputs // PANEL_COLUMNS) * PANEL_COLUMNS, -1, dtype=np.int64)
    order[:num_outputs] = np.arange(num_outputs)
    scales = np.ones(order.size, dtype=np.float32)
    sums = np.zeros(order.size, dtype=np.int32)
    sums[:num_outputs] = matrix.sum(axis=1)
    stored = matrix.astype(np.int8) if int8 else to_bfloat16(matrix.astype(np.float32))
    panels = library.pack(stored.ctypes.data, depth, stored.itemsize, order)
    weights = Weights(panels=panels.ctypes.data, num_columns=order.size, depth=depth, num_outputs=num_outputs)
    if int8:
        weights.scales, weights.sums = scales.ctypes.data, sums.ctypes.data
    rows = to_bfloat16(x.astype(np.float32))
    y = np.full((num_rows, num_outputs), np.nan, dtype=np.float32)
    address = rows.ctypes.data
    library.linear(
        weights, address, depth, num_rows, y.ctypes.data, num_outputs, Epilogue.WRITE_FLOAT, Workspace(), num_threads=1
    )
    return bool(np.array_equal(y, x @ matrix.T))


def quantized(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return finite `[.., head_dim]` as rows in 8 bits (csrc/kv_rows.h), and what these stand for."""
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(values / np.where(scales > 0, scales, np.float32(1))).astype(np.int8)
    return np.concatenate([codes.view(np.uint8), scales.view(np.uint8)], axis=-1), codes * scales


def _attention_difference(library: KernelLibrary, window: int, int8: bool) -> float:
    """A prefill chunk over two chunks of the kernel, and a decode token; NaN where no token is."""
    num_heads, num_kv_heads, head_dim, block_size = 6, 2, 80, 16
    context_lens, num_queries = (150, 21), (35, 1)
    random = np.random.default_rng(1)
    blocks_of = [-(-length // block_size) for length in context_lens]
    blocks = random.permutation(sum(blocks_of)).astype(np.int32)
    tables = np.zeros((2, max(blocks_of)), dtype=np.int32)
    width = head_dim + np.dtype(np.float32).itemsize if int8 else head_dim
    shape = (blocks.size, 2, num_kv_heads, block_size, width)
    cache = np.full(shape, 0xFF, np.uint8) if int8 else np.full(shape, 0x7FC0, np.uint16)
    q = to_bfloat16(random.standard_normal((sum(num_queries), num_heads, head_dim)).astype(np.float32))
    out = np.full(q.shape, 0x7FC0, dtype=np.uint16)
    expected = []
    row = 0
    for b, (length, queries) in enumerate(zip(context_lens, num_queries, strict=True)):
        tables[b, : blocks_of[b]] = blocks[sum(blocks_of[:b]) :][: blocks_of[b]]
        drawn = random.standard_normal((2, num_kv_heads, length, head_dim)).astype(np.float32)
        rows, meant = quantized(drawn) if int8 else (to_bfloat16(drawn), from_bfloat16(to_bfloat16(drawn)))
        for token in range(length):
            cache[tables[b, token // block_size], :, :, token % block_size] = rows[:, :, token]
        keys, values = np.repeat(meant.astype(np.float64), num_heads // num_kv_heads, axis=1)
        for position in range(length - queries, length):
            seen = slice(0 if window == 0 else max(0, position - window + 1), position + 1)
            scores = np.einsum("hd,htd->ht", from_bfloat16(q[row]), keys[:, seen]) / head_dim**0.5
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            expected.append(np.einsum("ht,htd->hd", weights / weights.sum(axis=1, keepdims=True), values[:, seen]))
            row += 1
    query_start = np.array([0, num_queries[0], row], dtype=np.int32)
    lengths = np.array(context_lens, dtype=np.int32)
    call = AttentionCall(
        q=q.ctypes.data,
        q_stride=num_heads * head_dim,
        out=out.ctypes.data,
        cache=cache.ctypes.data,
        block_stride=cache[0].size,
        block_tables=tables.ctypes.data,
        table_stride=tables.shape[1],
        query_start=query_start.ctypes.data,
        context_lens=lengths.ctypes.data,
        num_sequences=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        scale=head_dim**-0.5,
        is_int8=int8,
    )
    library.attention(call, Workspace(), num_threads=1)
    return float(np.abs(from_bfloat16(out) - np.stack(expected)).max())


if __name__ == "__main__":
    try:
        check(KernelLibrary(Path(sys.argv[1])))
    except KernelError as error:
        sys.exit(str(error))
