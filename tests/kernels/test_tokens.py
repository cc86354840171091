"""RMS norm, rotary embedding and storing in the paged cache, in C against the torch path."""

from __future__ import annotations

from ctypes import byref

import pytest
import torch
from torch import Tensor

from services.engine.native.attention.attention import store
from services.engine.native.kernels.library import AppendCall, KernelLibrary
from services.engine.native.model.rope import cos_sin, rotate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).bfloat16()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 100, 896])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 40])
def test_rms_norm_rounds_as_transformers_does(library: KernelLibrary, size: int, num_rows: int) -> None:
    x, weight = 3 * normal(num_rows, size), normal(size, seed=1)
    y = torch.full((num_rows + 1, size), torch.nan, dtype=torch.bfloat16)
    library.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), num_rows, size, 1e-5, 2)
    assert y[num_rows:].isnan().all()
    torch.testing.assert_close(y[:num_rows], rms_norm(x, weight, 1e-5), rtol=2**-7, atol=1e-6)
    if num_rows > 1:
        one = torch.empty(size, dtype=torch.bfloat16)
        library.rms_norm(x[num_rows - 1].data_ptr(), weight.data_ptr(), one.data_ptr(), 1, size, 1e-5, 1)
        assert torch.equal(one, y[num_rows - 1])


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_normalized_and_rotated_and_keys_and_values_stored(
    library: KernelLibrary, head_dim: int, normed: bool
) -> None:
    num_heads, num_kv_heads, num_tokens, block_size, layer = 5, 2, 37, 16, 1
    num_rotated = num_heads + num_kv_heads
    qkv = normal(num_tokens, num_rotated + num_kv_heads, head_dim)
    norm = normal(num_rotated, head_dim, seed=1)
    positions = torch.randint(0, 5000, (num_tokens,), generator=torch.Generator().manual_seed(2))
    frequencies = 1e4 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    slots = torch.randperm(5 * block_size, generator=torch.Generator().manual_seed(3))[:num_tokens]
    cache = torch.full((5, 2, 2, num_kv_heads, block_size, head_dim), 7.0, dtype=torch.bfloat16)

    expected = qkv.clone()
    heads = rms_norm(expected[:, :num_rotated], norm, 1e-6) if normed else expected[:, :num_rotated]
    cos, sin = cos_sin(positions, frequencies, 1.25, torch.float32)
    expected[:, :num_rotated] = rotate(heads.float(), cos, sin).bfloat16()

    table = torch.empty((num_tokens, 2, head_dim // 2))
    half = head_dim // 2
    functions = library._library  # steps of `forward`, which nothing else calls
    functions.tandem_rope_table(positions.data_ptr(), frequencies.data_ptr(), 1.25, num_tokens, half, table.data_ptr())
    torch.testing.assert_close(table, torch.stack((cos, sin), dim=1)[:, :, 0], rtol=0, atol=1e-6)
    before = cache.clone()
    call = AppendCall(
        qkv=qkv.data_ptr(),
        table=table.data_ptr(),
        norm=norm.data_ptr() if normed else None,
        slots=slots.data_ptr(),
        cache=cache[0, layer].data_ptr(),
        block_stride=cache.stride(0),
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        eps=1e-6,
    )
    functions.tandem_rope_append(byref(call), 2)
    # A value between two numbers of bfloat16 may fall to either side.
    torch.testing.assert_close(qkv, expected, rtol=2**-7, atol=1e-2 if normed else 2**-7)
    assert torch.equal(qkv[:, num_rotated:], expected[:, num_rotated:])
    store(before, layer, (slots // block_size, slots % block_size), qkv[:, num_heads:num_rotated], qkv[:, num_rotated:])
    assert torch.equal(cache, before)
