"""Rotates positions: RoPE, as default, linear, llama3 and yarn.

Su et al. 2021, "RoFormer". A step's layers share cos and sin of its positions; a table over the whole context would be
tens of megabytes and save nothing measurable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.engine.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of elements, float32 `[head_dim / 2]`.

    The arithmetic follows `transformers.modeling_rope_utils` operation by operation, so that angles agree to the bit.
    """
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim)
    if rope.rope_type == "linear":
        return (1.0 / powers) / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, 1.0 / powers)
    if rope.rope_type == "yarn":
        return _yarn(rope, powers, head_dim)
    return 1.0 / powers


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings
    longest, shortest = original / rope.low_freq_factor, original / rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = ~(wavelengths < shortest) * ~(wavelengths > longest)
    return torch.where(is_between, between, scaled)


def _yarn(rope: RopeConfig, powers: Tensor, head_dim: int) -> Tensor:
    """YaRN's "NTK by parts" (Peng et al. 2023): a ramp from frequencies that are kept to ones that are stretched."""

    def dimension_turning(num_rotations: float) -> float:
        """Return the index of the pair that turns `num_rotations` times over the original context."""
        ratio = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return (head_dim * math.log(ratio)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def cos_sin(
    positions: Tensor, frequencies: Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles of T tokens, each `[T, 1, head_dim / 2]` in `dtype`."""
    angles = (positions[:, None].to(torch.float32) * frequencies)[:, None, :]
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads `x` `[T, num_heads, head_dim]`: element i is paired with element i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
