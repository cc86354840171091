"""Binds the kernels' shared libraries with ctypes: one per kind of processor, all from csrc/.

Addresses go in, nothing is checked there: whoever calls owns the arrays, and has checked their shapes. No torch.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.engine.native.build import KERNEL_SOURCES, source_digest

PANEL_COLUMNS: Final = 32
_ALIGNMENT_BYTES: Final = 2 << 20  # a huge page: weights stream through memory, and the TLB would miss at every page


class KernelError(Exception):
    """Kernels are not built, do not load, or compute something wrong here; the message says which."""


class Epilogue(IntEnum):
    """The work that a projection does on its sums at once (csrc/linear.h)."""

    WRITE = 0
    ADD = 1
    WRITE_FLOAT = 2
    GATE_SILU = 3
    GATE_GELU_TANH = 4
    GATE_GELU_ERF = 5


class Weights(Structure):
    """`struct weights` of csrc/linear.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("num_columns", c_int64),
        ("depth", c_int64),
        ("num_outputs", c_int64),
    )


class AttentionCall(Structure):
    """`struct attention_call` of csrc/attention.h."""

    _fields_ = (
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("cache", c_void_p),
        ("block_stride", c_int64),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("num_sequences", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("is_int8", c_int32),
    )


class AppendCall(Structure):
    """`struct append_call` of csrc/tokens.h."""

    _fields_ = (
        ("qkv", c_void_p),
        ("table", c_void_p),
        ("norm", c_void_p),
        ("slots", c_void_p),
        ("cache", c_void_p),
        ("block_stride", c_int64),
        ("num_tokens", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("eps", c_float),
        ("is_int8", c_int32),
    )


class Layer(Structure):
    """`struct layer` of csrc/model.h."""

    _fields_ = (
        ("qkv", Weights),
        ("o", Weights),
        ("gate_up", Weights),
        ("down", Weights),
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("qk_norm", c_void_p),
        ("window", c_int64),
    )


class Stage(IntEnum):
    """The stages that a step's time is counted by (csrc/model.h)."""

    EMBED = 0
    NORM = 1
    QKV = 2
    APPEND = 3
    ATTENTION = 4
    OUTPUT = 5
    GATE_UP = 6
    DOWN = 7
    LOGITS = 8


class ForwardCall(Structure):
    """`struct forward_call` of csrc/model.h."""

    _fields_ = (
        ("layers", c_void_p),
        ("lm_head", c_void_p),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("layer_stride", c_int64),
        ("gate", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("frequencies", c_void_p),
        ("rope_factor", c_float),
        ("wanted", c_void_p),
        ("num_wanted", c_int64),
        ("logits", c_void_p),
        ("append", AppendCall),
        ("attention", AttentionCall),
        ("x", c_void_p),
        ("normed", c_void_p),
        ("gated", c_void_p),
        ("angles", c_void_p),
        ("seconds", c_double * len(Stage)),
    )


_SIGNATURES: Final = {
    "tandem_source_digest": ((), c_uint32),
    "tandem_name": ((), c_char_p),
    "tandem_start": ((), c_int),
    "tandem_packed_bytes": ((c_int64, c_int64, c_int), c_int64),
    "tandem_pack": ((c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p), None),
    "tandem_linear_workspace": ((POINTER(Weights), c_int64), c_int64),
    "tandem_linear": (
        (POINTER(Weights), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int, c_void_p, c_int),
        None,
    ),
    "tandem_attention_workspace": ((c_int64, c_int), c_int64),
    "tandem_attention": ((POINTER(AttentionCall), c_void_p, c_int), None),
    "tandem_rms_norm": ((c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int), None),
    "tandem_rope_table": ((c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p), None),
    "tandem_rope_append": ((POINTER(AppendCall), c_int), None),
    "tandem_forward_workspace": ((POINTER(ForwardCall), c_int), c_int64),
    "tandem_peak": ((c_int, c_int64), c_double),
    "tandem_forward": ((POINTER(ForwardCall), c_void_p, c_int), None),
    "tandem_use_helpers": ((c_int,), c_int),
    "tandem_wait_for_helpers": ((), None),
    "tandem_count_helped": ((POINTER(c_int64), POINTER(c_int64)), None),
}


class Workspace:
    """Scratch memory that grows to the largest call. For one thread's use.

    What it has outgrown is kept, no more than it has: a helper that was asleep may go on to read there.
    """

    def __init__(self) -> None:
        self._memory = aligned_bytes(0)
        self._outgrown: list[npt.NDArray[np.uint8]] = []

    def address(self, num_bytes: int) -> int:
        """Return where at least `num_bytes`, aligned to 64, may be used until the next call of this method."""
        if self._memory.nbytes < num_bytes:
            self._outgrown.append(self._memory)
            self._memory = aligned_bytes(max(num_bytes, 2 * self._memory.nbytes))
        return self._memory.ctypes.data


class KernelLibrary:
    """Calls one library's functions. Threads may share it; a second caller computes on its own thread."""

    def __init__(self, path: Path) -> None:
        """Load `path`. Raises `KernelError` where it does not load, is stale, or the system refuses what it needs."""
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (arguments, result) in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, result
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path.name} does not load: {error}") from error
        if self._library.tandem_source_digest() != source_digest(KERNEL_SOURCES):
            raise KernelError(
                f"{path.name} was built from other sources than are here: build it again (`make kernels`)"
            )
        if not self._library.tandem_start():
            raise KernelError(f"the system does not let this process use what {path.name} needs")
        self.name: str = self._library.tandem_name().decode()

    def pack(self, matrix: int, depth: int, element_bytes: int, order: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return the panels of the matrix `[.., depth]` at address `matrix`, of which column i is row `order[i]`.

        `order` is a whole number of panels; -1 stands for a row of zeros.
        """
        assert order.size % PANEL_COLUMNS == 0
        panels = aligned_bytes(self._library.tandem_packed_bytes(order.size, depth, element_bytes))
        self._library.tandem_pack(matrix, depth, element_bytes, order.ctypes.data, order.size, panels.ctypes.data)
        return panels

    def linear(
        self,
        weights: Weights,
        x: int,
        x_stride: int,
        num_rows: int,
        y: int,
        y_stride: int,
        epilogue: Epilogue,
        workspace: Workspace,
        num_threads: int,
    ) -> None:
        """Multiply x, bf16 `[num_rows, depth]`, by `weights`: y is `[num_rows, num_outputs]`. Strides in elements."""
        scratch = workspace.address(self._library.tandem_linear_workspace(byref(weights), num_rows))
        self._library.tandem_linear(
            byref(weights), x, x_stride, num_rows, y, y_stride, epilogue.value, scratch, num_threads
        )

    def attention(self, call: AttentionCall, workspace: Workspace, num_threads: int) -> None:
        """Let each query of the call see its sequence up to itself."""
        scratch = workspace.address(self._library.tandem_attention_workspace(call.head_dim, num_threads))
        self._library.tandem_attention(byref(call), scratch, num_threads)

    def rms_norm(self, x: int, weight: int, y: int, num_rows: int, size: int, eps: float, num_threads: int) -> None:
        """Normalize x, bf16 `[num_rows, size]`, into y; contiguous."""
        self._library.tandem_rms_norm(x, weight, y, num_rows, size, eps, num_threads)

    def forward(self, call: ForwardCall, workspace: Workspace, num_threads: int) -> None:
        """Do one step of a model: keys and values into the cache, logits of the wanted tokens, seconds by stage."""
        scratch = workspace.address(self._library.tandem_forward_workspace(byref(call), num_threads))
        self._library.tandem_forward(byref(call), scratch, num_threads)

    def use_helpers(self, num_helpers: int) -> int:
        """Have so many threads at the lowest priority help one that multiplies many rows; returns how many there are.

        They are the process's, and belong to no model. Fewer than wanted where the system refuses, or there would be
        more than 16.
        """
        return int(self._library.tandem_use_helpers(num_helpers))

    def wait_for_helpers(self) -> None:
        """Return when none reads operands any more. Between calls: before weights, or a workspace, are freed."""
        self._library.tandem_wait_for_helpers()

    def count_helped(self) -> tuple[int, int]:
        """Return how many panels helpers have brought so far, and how many were computed since one did not come."""
        num_helped, num_redone = c_int64(), c_int64()
        self._library.tandem_count_helped(byref(num_helped), byref(num_redone))
        return num_helped.value, num_redone.value

    def multiply_at_peak(self, int8: bool, repetitions: int) -> float:
        """Multiply what lies in L1, `repetitions` times; return the number of operations. For benchmarks."""
        return float(self._library.tandem_peak(int8, repetitions))


def aligned_bytes(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return uninitialized memory, aligned to a huge page where it is as large as one, else to 64 bytes."""
    alignment = _ALIGNMENT_BYTES if num_bytes >= _ALIGNMENT_BYTES else 64
    memory = np.empty(num_bytes + alignment, dtype=np.uint8)
    skip = -memory.ctypes.data % alignment
    return memory[skip : skip + num_bytes]
