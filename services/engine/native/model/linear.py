"""Computes `y = x W^T + b`: one of the two seams (with attention) where kernels are exchanged."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """A projection with its weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the projection of `x` `[T, in_features]`, T at least 1: `[T, out_features]` in the dtype of `x`."""


class PlainLinear:
    """torch's own kernel, for CUDA. Keeps `weight` `[out, in]` and `bias` `[out]`, uncopied."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """oneDNN, with weights laid out once for its kernels: CPU, float32 and (see `compute_dtype`) bfloat16.

    A decode step is bound by reading the weights: packed they stream at 12 to 13 GB/s a core, plain at 8 to 11, and
    float32 takes a half to a third of the plain kernel's time at any batch size (AMD Zen 5, torch 2.13).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def cpu_has_bfloat16() -> bool:
    """Return whether oneDNN has bfloat16 kernels for this CPU (AVX-512 or better, not emulation)."""
    return _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which a model of `dtype` is computed on `device`.

    On a CPU, float16 always and bfloat16 without its instructions are computed in float32, weights included: emulated,
    they take 2 to 8 times as long. KV keeps the model's dtype, so that unlike machines can exchange blocks.
    """
    if device.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bfloat16())):
        return torch.float32
    return dtype


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return the fastest `Linear` for `weight` `[out, in]`, already in the compute dtype and on its device."""
    if weight.device.type == "cpu" and _has_onednn():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)
