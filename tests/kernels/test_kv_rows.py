"""Keys and values in 8 bits: every variant writes the bytes that torch does, for whatever operands."""

from __future__ import annotations

from ctypes import byref

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.native.attention.attention import store
from services.engine.native.attention.int8_rows import dequantized, quantized
from services.engine.native.kernels import self_check
from services.engine.native.kernels.library import AppendCall, KernelLibrary

LARGEST = torch.finfo(torch.bfloat16).max
SMALLEST = 2.0**-133  # of bfloat16, denormal


def extreme_rows(head_dim: int) -> Tensor:
    """Rows `[.., head_dim]` of bfloat16 that quantizing may stumble over."""
    random = torch.randn(40, head_dim, generator=torch.Generator().manual_seed(head_dim))
    rows = [torch.zeros(head_dim), -torch.zeros(head_dim), torch.full((head_dim,), LARGEST), random[0] * 1e38]
    rows += [random[1] * 2.0**-exponent for exponent in (118, 126, 130, 133)]
    for value in (LARGEST, -LARGEST, SMALLEST, -3 * SMALLEST, torch.inf, -torch.inf, torch.nan):
        for place in (0, head_dim // 2, head_dim - 1):  # the only one, and beside others
            rows += [torch.zeros(head_dim), random[place % 40].clone()]
            rows[-1][place] = rows[-2][place] = value
    halves = torch.arange(head_dim) % 64 + 0.5  # ties
    halves[-1] = 127.0
    return torch.cat([torch.stack([*rows, halves, -halves]), random]).bfloat16()


@pytest.mark.parametrize("head_dim", [16, 34, 64, 80, 128])
def test_every_variant_stores_the_bytes_that_torch_does(library: KernelLibrary, head_dim: int) -> None:
    rows = extreme_rows(head_dim)
    num_tokens, block_size = len(rows) // 2, 16
    qkv = torch.cat([torch.zeros(num_tokens, 1, head_dim).bfloat16(), rows.view(num_tokens, 2, head_dim)], dim=1)
    table = torch.stack((torch.ones(num_tokens, head_dim // 2), torch.zeros(num_tokens, head_dim // 2)), dim=1)
    slots = torch.randperm(8 * block_size, generator=torch.Generator().manual_seed(3))[:num_tokens]
    cache = torch.full((8, 2, 2, 1, block_size, head_dim + 4), 7, dtype=torch.uint8)
    expected = cache.clone()
    call = AppendCall(
        qkv=qkv.data_ptr(),
        table=table.data_ptr(),
        slots=slots.data_ptr(),
        cache=cache[0, 1].data_ptr(),
        block_stride=cache.stride(0),
        num_tokens=num_tokens,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        block_size=block_size,
        is_int8=True,
    )
    library._library.tandem_rope_append(byref(call), 2)
    store(expected, 1, (slots // block_size, slots % block_size), qkv[:, 1:2], qkv[:, 2:3])
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_stands_for_what_was_put_into_it_to_half_a_step(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[7, 1, 5] = 1000.0
    largest = x.float().abs().amax(-1, keepdim=True)
    error = (dequantized(quantized(x), torch.float32) - x.float()).abs()
    assert (error <= largest / 127 * (0.5 + 1e-5)).all()
    assert (error.amax(-1, keepdim=True) > largest / 127 * 0.4).any()


@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-140, 3e38])
def test_very_small_and_very_large_numbers_of_float32_stay_numbers(value: float) -> None:
    x = torch.tensor([value, -value, 0.0, value / 2])
    meant = dequantized(quantized(x), torch.float32)
    assert meant.isfinite().all()
    assert (meant.sign() * x.sign() >= 0).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_with_what_is_no_number_is_none(value: float) -> None:
    assert dequantized(quantized(torch.tensor([1.0, value, 3.0, 4.0])), torch.float32).isnan().all()


def test_the_check_at_start_quantizes_alike() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    rows, meant = self_check.quantized(x)
    assert np.array_equal(rows, quantized(torch.from_numpy(x)).numpy())
    assert np.array_equal(meant, dequantized(torch.from_numpy(rows), torch.float32).numpy())
