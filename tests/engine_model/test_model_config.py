"""config.json as published by the models' makers is understood; what cannot be computed is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.engine.model_config import (
    ModelConfig,
    ModelNotFound,
    RopeConfig,
    UnsupportedModel,
    parse_config,
    read_config,
)

LLAMA_2_7B: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B_V0_1: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_7B_V0_3: dict[str, Any] = {
    **MISTRAL_7B_V0_1,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "transformers_version": "4.42.0.dev0",
    "vocab_size": 32768,
}
QWEN_2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# What only Llama 3.1's entry spells out, the others take from here.
PLAIN = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "tie_word_embeddings": False}


def expected(raw: dict[str, Any], **fields: Any) -> ModelConfig:
    same = ("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps", "max_position_embeddings")
    eos = raw["eos_token_id"]
    return ModelConfig(
        **{
            "architecture": raw["architectures"][0],
            "num_layers": raw["num_hidden_layers"],
            "num_heads": raw["num_attention_heads"],
            "num_kv_heads": raw["num_key_value_heads"],
            "head_dim": 128,
            "dtype": raw["torch_dtype"],
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
            "sliding_windows": (None,) * raw["num_hidden_layers"],
            **{name: raw[name] for name in same},
            **PLAIN,
            **fields,
        }
    )


PUBLISHED = {
    "Llama-2-7b": (LLAMA_2_7B, {"rope": RopeConfig("default", 10_000.0)}),
    "Llama-3.1-8B-Instruct": (
        LLAMA_3_1_8B,
        {"rope": RopeConfig("llama3", 500_000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)},
    ),
    "Mistral-7B-v0.1": (
        MISTRAL_7B_V0_1,
        {"rope": RopeConfig("default", 10_000.0), "sliding_windows": (4096,) * 32},
    ),
    "Mistral-7B-v0.3": (MISTRAL_7B_V0_3, {"rope": RopeConfig("default", 1_000_000.0)}),
    "Qwen2.5-7B-Instruct": (QWEN_2_5_7B, {"rope": RopeConfig("default", 1_000_000.0), "qkv_bias": True}),
    "Qwen3-8B": (QWEN_3_8B, {"rope": RopeConfig("default", 1_000_000.0), "qk_norm": True}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_understood(name: str) -> None:
    raw, fields = PUBLISHED[name]
    assert parse_config(raw) == expected(raw, **fields)


def test_yarn_as_qwen_recommends_it() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    config = parse_config({**QWEN_2_5_7B, "rope_scaling": scaling})
    assert config.rope.rope_type == "yarn"
    assert config.rope.attention_factor == pytest.approx(1.13863, abs=1e-5)
    assert config.max_position_embeddings == 32768
    assert config.max_context_len == 131072


@pytest.mark.parametrize(
    ("rope_scaling", "context"),
    [
        (None, 40960),
        ({"rope_type": "linear", "factor": 2.0}, 81920),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768}, 40960),
    ],
)
def test_context_length_follows_the_scaling(rope_scaling: dict[str, Any] | None, context: int) -> None:
    assert parse_config({**QWEN_3_8B, "rope_scaling": rope_scaling}).max_context_len == context


def test_transformers_5_spelling_means_the_same() -> None:
    old = parse_config(LLAMA_3_1_8B)
    raw = {
        key: value for key, value in LLAMA_3_1_8B.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")
    }
    raw["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    raw["dtype"] = "bfloat16"
    assert parse_config(raw) == old


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    sizes = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    bare = {key: QWEN_3_8B[key] for key in (*sizes, "num_attention_heads")}
    config = parse_config(bare)
    assert (config.head_dim, config.num_kv_heads, config.max_position_embeddings) == (128, 32, 32768)
    assert (config.rope, config.rms_norm_eps) == (RopeConfig("default", 10_000.0), 1e-6)
    assert (config.dtype, config.eos_token_ids) == (None, ())
    mistral = parse_config({**bare, "architectures": ["MistralForCausalLM"]})
    assert (mistral.num_kv_heads, mistral.sliding_windows[0], mistral.eos_token_ids) == (8, 4096, (2,))


def test_qwen_windows_follow_max_window_layers_and_layer_types() -> None:
    windowed = {**QWEN_2_5_7B, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 26}
    assert parse_config(windowed).sliding_windows == (None,) * 26 + (100, 100)
    types = ["sliding_attention", "full_attention"] * 14
    assert parse_config({**windowed, "layer_types": types}).sliding_windows == (100, None) * 14


def test_eos_tokens_come_from_generation_config_first() -> None:
    assert parse_config(QWEN_3_8B, {"eos_token_id": [151645, 151643]}).eos_token_ids == (151645, 151643)
    assert parse_config(QWEN_3_8B, {"temperature": 0.6}).eos_token_ids == (151645,)
    assert parse_config({**QWEN_3_8B, "eos_token_id": None}).eos_token_ids == ()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    ({"architectures": None}, "architectures"),
    ({"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "architectures"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"num_experts": 8}, "num_experts"),
    ({"hidden_act": "relu2"}, "relu2"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "low_freq_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"layer_types": ["chunked_attention"] * 36}, "chunked_attention"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 36}, "sliding_window"),
    ({"torch_dtype": "float64"}, "float64"),
    ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ({"head_dim": 127}, "head_dim"),
    ({"hidden_size": "big"}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED, ids=[f"{named}-{i}" for i, (_, named) in enumerate(REFUSED)])
def test_what_cannot_be_computed_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse_config({**QWEN_3_8B, **settings})


def test_layer_types_that_alternate_are_refused_for_mistral() -> None:
    types = ["sliding_attention", "full_attention"] * 16
    with pytest.raises(UnsupportedModel, match="layer_types"):
        parse_config({**MISTRAL_7B_V0_1, "layer_types": types})


def test_a_directory_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        read_config(tmp_path)


def test_both_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3_8B))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert read_config(tmp_path).eos_token_ids == (5, 6)
