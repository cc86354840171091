"""Angles agree with `transformers` to the bit, for both spellings of the settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from services.engine.model_config import parse_config
from services.engine.native.model.rope import cos_sin, inverse_frequencies, rotate

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn from max_position_embeddings": {"rope_type": "yarn", "factor": 4.0},
    "yarn without truncation": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "truncate": False,
    },
    "yarn with betas": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 100,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 100,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn with one mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 100,
        "mscale": 0.7,
    },
    "yarn with attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 0.9,
    },
    "yarn that shrinks nothing": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
}


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_agree_with_transformers(name: str, spelling: str, theta: float) -> None:
    settings = ROPES[name]
    reference = transformers.LlamaConfig(**BASE, rope_parameters={**settings, "rope_theta": theta})
    if settings["rope_type"] == "default":
        expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(
            reference
        )
    else:
        expected = ROPE_INIT_FUNCTIONS[settings["rope_type"]](reference)
    raw: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **BASE}
    if spelling == "rope_parameters":
        raw["rope_parameters"] = {**settings, "rope_theta": theta}
    else:
        old = dict(settings)
        if spelling == "type":
            old["type"] = old.pop("rope_type")
        raw |= {"rope_theta": theta, "rope_scaling": None if name == "default" else old}
    rope = parse_config(raw).rope
    assert torch.equal(inverse_frequencies(rope, 128), expected[0])
    assert rope.attention_factor == expected[1]


def test_rotation_agrees_with_transformers() -> None:
    config = parse_config({"architectures": ["LlamaForCausalLM"], **BASE, "rope_parameters": ROPES["yarn"]})
    reference_config = transformers.LlamaConfig(**BASE, rope_parameters=dict(ROPES["yarn"], rope_theta=10_000.0))
    llama = transformers.models.llama.modeling_llama
    positions = torch.tensor([0, 1, 7, 4095, 100_000])
    heads = torch.randn(5, 3, 128, generator=torch.Generator().manual_seed(0))
    cos, sin = llama.LlamaRotaryEmbedding(reference_config)(heads, positions[None])
    expected, _ = llama.apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    frequencies = inverse_frequencies(config.rope, 128)
    ours = rotate(heads, *cos_sin(positions, frequencies, config.rope.attention_factor, heads.dtype))
    torch.testing.assert_close(ours.transpose(0, 1)[None], expected, rtol=0, atol=1e-6)
