"""Calls of the kernels in a file, for a driver on another processor, and what the portable kernels make of them."""

from __future__ import annotations

import struct
from ctypes import byref
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.engine.native.kernels.library import (
    PANEL_COLUMNS,
    AppendCall,
    AttentionCall,
    Epilogue,
    KernelLibrary,
    Weights,
    Workspace,
)
from services.engine.native.kernels.self_check import quantized, to_bfloat16

Array = npt.NDArray[np.generic]

_LINEAR, _ATTENTION, _NORM, _APPEND = range(4)
_NUM_PARAMETERS, _NUM_ARRAYS = 16, 8


@dataclass
class Cases:
    """Cases for neon_driver.c, each computed here as well; what it writes must be `expected`."""

    portable: KernelLibrary
    file: bytearray = field(default_factory=bytearray)
    expected: list[tuple[str, Array]] = field(default_factory=list)

    def _add(self, function: int, numbers: list[int], arrays: list[Array | None]) -> None:
        self.file += struct.pack(f"<q{_NUM_PARAMETERS}q", function, *numbers, *[0] * (_NUM_PARAMETERS - len(numbers)))
        for array in [*arrays, *[None] * (_NUM_ARRAYS - len(arrays))]:
            data = b"" if array is None else array.tobytes()
            self.file += struct.pack("<q", len(data)) + data

    def linear(
        self, num_rows: int, num_outputs: int, depth: int, epilogue: Epilogue, *, int8: bool, extreme: bool = False
    ) -> None:
        """Random bfloat16, or int8, of which the largest there are if `extreme`."""
        random = np.random.default_rng((num_rows, num_outputs, depth))
        gated = epilogue >= Epilogue.GATE_SILU
        num_columns = -(-num_outputs * (2 if gated else 1) // PANEL_COLUMNS) * PANEL_COLUMNS
        order = np.arange(num_columns, dtype=np.int64)
        order[num_outputs * (2 if gated else 1) :] = -1
        if int8:
            whole = (
                random.choice([-127, 127], (num_columns, depth))
                if extreme
                else random.integers(-127, 128, (num_columns, depth))
            )
            matrix: Array = whole.astype(np.int8)
            scales: Array | None = random.random(num_columns, dtype=np.float32) + 0.5
            sums: Array | None = np.where(order >= 0, whole.sum(axis=1), 0).astype(np.int32)
        else:
            matrix, scales, sums = _normal(random, num_columns, depth), None, None
        x = (
            to_bfloat16(random.choice([-127.0, 127.0], (num_rows, depth)).astype(np.float32))
            if extreme
            else _normal(random, num_rows, depth)
        )
        bias = random.standard_normal(num_columns).astype(np.float32)
        y: Array = (
            random.standard_normal((num_rows, num_outputs)).astype(np.float32)
            if epilogue is Epilogue.WRITE_FLOAT
            else _normal(random, num_rows, num_outputs)
        )
        numbers = [num_columns, depth, matrix.itemsize, num_outputs, num_rows, depth, num_outputs, epilogue.value, 2]
        self._add(_LINEAR, numbers, [matrix, order, bias, scales, sums, x, y])
        panels = self.portable.pack(matrix.ctypes.data, depth, matrix.itemsize, order)
        weights = Weights(
            panels.ctypes.data, bias.ctypes.data, _address(scales), _address(sums), num_columns, depth, num_outputs
        )
        self.portable.linear(
            weights, x.ctypes.data, depth, num_rows, y.ctypes.data, num_outputs, epilogue, Workspace(), num_threads=1
        )
        self.expected.append((f"{num_rows} rows, {depth} x {num_outputs}, {epilogue.name}, int8={int8}", y))

    def attention(self, lengths: list[tuple[int, int]], head_dim: int, window: int, *, int8: bool = False) -> None:
        """Sequences of (context, new tokens); blocks in disorder, NaN in what nobody owns."""
        random = np.random.default_rng((len(lengths), head_dim, window))
        num_heads, num_kv_heads, block_size = 6, 2, 16
        blocks_of = [-(-context // block_size) for context, _ in lengths]
        blocks = random.permutation(sum(blocks_of)).astype(np.int32)
        tables = np.zeros((len(lengths), max(blocks_of)), dtype=np.int32)
        shape = (blocks.size, 2, num_kv_heads, block_size)
        cache: Array = (
            np.full((*shape, head_dim + 4), 0xFF, dtype=np.uint8)
            if int8
            else np.full((*shape, head_dim), 0x7FC0, dtype=np.uint16)
        )
        for b, (context, _) in enumerate(lengths):
            tables[b, : blocks_of[b]] = blocks[sum(blocks_of[:b]) :][: blocks_of[b]]
            stored: Array = _normal(random, context, 2, num_kv_heads, head_dim)
            if int8:
                stored, _ = quantized(random.standard_normal((context, 2, num_kv_heads, head_dim)).astype(np.float32))
            for token in range(context):
                cache[tables[b, token // block_size], :, :, token % block_size] = stored[token]
        starts = np.cumsum([0, *(new for _, new in lengths)]).astype(np.int32)
        contexts = np.array([context for context, _ in lengths], dtype=np.int32)
        q = _normal(random, int(starts[-1]), num_heads, head_dim)
        out = np.zeros_like(q)
        scale = np.array([head_dim**-0.5], dtype=np.float32)
        numbers = [
            q[0].size,
            cache[0].size,
            tables.shape[1],
            len(lengths),
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            window,
            2,
            int8,
        ]
        self._add(_ATTENTION, numbers, [q, out, cache, tables, starts, contexts, scale])
        call = AttentionCall(
            q.ctypes.data,
            q[0].size,
            out.ctypes.data,
            cache.ctypes.data,
            cache[0].size,
            tables.ctypes.data,
            tables.shape[1],
            starts.ctypes.data,
            contexts.ctypes.data,
            *numbers[3:9],
            float(scale[0]),
            int8,
        )
        self.portable.attention(call, Workspace(), num_threads=1)
        self.expected.append((f"attention of {lengths}, head size {head_dim}, window {window}, int8={int8}", out))

    def norm(self, num_rows: int, size: int) -> None:
        random = np.random.default_rng(size)
        x, weight = _normal(random, num_rows, size), _normal(random, size)
        y, eps = np.zeros_like(x), np.array([1e-6], dtype=np.float32)
        self._add(_NORM, [num_rows, size], [x, weight, y, eps])
        self.portable.rms_norm(x.ctypes.data, weight.ctypes.data, y.ctypes.data, num_rows, size, float(eps[0]), 1)
        self.expected.append((f"norm of {num_rows} rows of {size}", y))

    def append(self, num_tokens: int, head_dim: int, *, int8: bool = False) -> None:
        """Normalize and rotate queries and keys; by a table that is made here, since C libraries differ in cosines."""
        random = np.random.default_rng(head_dim)
        num_heads, num_kv_heads, block_size = 5, 2, 16
        qkv = _normal(random, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        norm = _normal(random, num_heads + num_kv_heads, head_dim)
        angles = random.random((num_tokens, head_dim // 2))
        table = np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)
        num_blocks = -(-num_tokens // block_size) + 1
        slots = random.permutation(num_blocks * block_size)[:num_tokens].astype(np.int64)
        shape = (num_blocks, 2, num_kv_heads, block_size)
        cache: Array = (
            np.zeros((*shape, head_dim + 4), dtype=np.uint8) if int8 else np.zeros((*shape, head_dim), dtype=np.uint16)
        )
        eps = np.array([1e-6], dtype=np.float32)
        numbers = [cache[0].size, num_tokens, num_heads, num_kv_heads, head_dim, block_size]
        self._add(_APPEND, [*numbers, 2, int8], [qkv, table, norm, slots, cache, eps])
        arrays = (array.ctypes.data for array in (qkv, table, norm, slots, cache))
        self.portable._library.tandem_rope_append(byref(AppendCall(*arrays, *numbers, float(eps[0]), int8)), 1)
        self.expected += [(f"queries and keys of {num_tokens} tokens", qkv), ("the cache after them", cache)]


def _normal(random: np.random.Generator, *shape: int) -> npt.NDArray[np.uint16]:
    return to_bfloat16(random.standard_normal(shape).astype(np.float32))


def _address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data
