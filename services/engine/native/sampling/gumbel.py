"""Draws the sampler's noise: Gumbel variates from (seed, position, counter), the same on every device.

Counter-based, as Philox and its like (Salmon et al. 2011): there is no state that a stream would have to hand over.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _mix(value: int) -> int:
    """splitmix64's output function (Steele, Lea, Flood 2014), on Python integers."""
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _row_key(seed: int, position: int) -> int:
    return _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def noise_keys(seeds_and_positions: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    """int64 `[n, 1]`: a hash of each row's seed and of the position of the token that is drawn."""
    keys = [_signed(_row_key(seed, position)) for seed, position in seeds_and_positions]
    return torch.tensor(keys, dtype=torch.int64, device=device).unsqueeze(1)


def gumbel(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel variates, float64: one per key `[n, 1]` and counter `[m]` or `[n, m]`.

    `_mix` of key + (counter + 1) * golden ratio, in int64 arithmetic that wraps, the same on CPU and CUDA.
    """
    mixed = keys + (counters + 1) * _signed(_GOLDEN)
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(_MIX_1)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(_MIX_2)
    mixed = mixed ^ _shift_right(mixed, 31)
    # 52 bits and a half: never 0, never 1, and exact in float64.
    uniform = (_shift_right(mixed, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()


def _shift_right(values: Tensor, num_bits: int) -> Tensor:
    """Logical shift; torch's own extends the sign."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)
