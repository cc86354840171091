"""Keys and values in 8 bits, in torch: the bytes that the C kernels write (kv_rows.h has the format)."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.kv_cache_dtype import INT8_SCALE_BYTES


def quantized(x: Tensor) -> Tensor:
    """Turn `[.., head_dim]` into rows, uint8 `[.., head_dim + 4]`; one with an infinity or a NaN is NaN as a whole."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest.isfinite(), largest / torch.tensor(127.0), torch.nan)
    # Not by an inverse, which would be infinite for the smallest. Of float32, scales may be too short to be exact.
    codes = (x / torch.where(scales > 0, scales, 1.0)).round().clamp(-127, 127)
    codes = torch.where(largest.isfinite(), codes, 0.0).to(torch.int8)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=-1)


def dequantized(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what rows, uint8 `[.., head_dim + 4]`, stand for: `[.., head_dim]` of `dtype`."""
    codes = rows[..., :-INT8_SCALE_BYTES].view(torch.int8)
    scales = rows[..., -INT8_SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes * scales).to(dtype)
