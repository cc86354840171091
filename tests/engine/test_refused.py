"""Models that config.json shows not to be served: which, in which words, and that no others are meant."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.engine.check import Machine
from services.engine.choice import check_model, with_engine
from services.engine.config import EngineConfig
from services.engine.model_config import UnsupportedModel
from services.engine.refused import refusal, refusal_by_vllm
from tests.hf_models import FAMILIES, FOREIGN_FAMILIES, REFUSED_CONFIGS, write_config

CPU = Machine(8 << 30, (), frozenset())
WORDS = {
    "mamba": "MambaForCausalLM: its layers keep a state that each token overwrites",
    "bamba": "BambaForCausalLM: its layers keep a state that each token overwrites",
    "bart": "BartForConditionalGeneration: its decoder reads what an encoder made",
    "qwen2_vl": "Qwen2VLForConditionalGeneration: it takes images, sound or video",
    "bert": "BertForMaskedLM: it makes embeddings, scores or classes",
}


@pytest.mark.parametrize("engine", ["native", "vllm", "auto"])
@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_what_no_engine_serves_is_refused_before_anything_is_loaded_and_says_what_to_do(
    name: str, engine: str, tmp_path: Path
) -> None:
    config = EngineConfig(str(write_config(tmp_path, name)), engine=engine)
    with pytest.raises(UnsupportedModel, match=re.escape(WORDS[name])) as refused:
        check_model(with_engine(config, CPU, "0.32.0+cpu"), CPU)
    assert "; take " in str(refused.value)
    assert "--engine vllm" not in str(refused.value)  # which would refuse it too


def test_windows_on_all_layers_are_refused_to_vllm_unless_they_are_taken_away(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    config = EngineConfig(str(write_config(tmp_path, "mistral_window")), engine="vllm")
    with pytest.raises(UnsupportedModel, match="MistralForCausalLM: all its layers have a sliding window"):
        check_model(config, CPU)
    flags = """--hf-overrides '{"sliding_window":null}'"""
    assert check_model(replace(config, engine_args=flags), CPU) == tmp_path
    assert check_model(replace(config, engine_args="--disable-sliding-window"), CPU) == tmp_path


@pytest.mark.parametrize("name", [*FAMILIES, *FOREIGN_FAMILIES, "mistral_full", "qwen2_wide"])
def test_no_family_that_is_served_is_refused(name: str, tmp_path: Path) -> None:
    flags = ["--disable-sliding-window"] if name == "mistral" else []
    assert not (objection := refusal_by_vllm(config_of(tmp_path, name), flags)), objection


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["ChatGLMModel"]},
        {"architectures": ["Gemma3ForCausalLM"], "vision_config": {}},  # cut out of the model that sees
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention"] * 2, "mamba_n_heads": 4},
        {"architectures": "LlamaForCausalLM", "layer_types": 7, "sliding_window": "wide", "model_type": None},
        {},
    ],
)
def test_what_may_be_served_is_left_to_vllm(config: dict[str, Any]) -> None:
    assert not refusal_by_vllm(config, [])


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["Qwen3NextForCausalLM"], "layer_types": ["linear_attention", "full_attention"]},
        {"architectures": ["Qwen3NextForCausalLM"], "linear_conv_kernel_dim": 4},
        {"architectures": ["Lfm2ForCausalLM"], "layer_types": ["conv", "full_attention"]},
        {"architectures": ["JambaForCausalLM"], "model_type": "jamba"},
        {"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-M*"},
        {"architectures": ["KimiLinearForCausalLM"], "linear_attn_config": {}},
    ],
)
def test_layers_that_keep_a_state_are_known_by_each_makers_words(config: dict[str, Any]) -> None:
    assert "a state that each token overwrites" in refusal(config)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_no_model_that_vllm_makes_text_with_is_refused_by_its_name() -> None:
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, _TRANSFORMERS_SUPPORTED_MODELS

    for name in (*_TEXT_GENERATION_MODELS, *_TRANSFORMERS_SUPPORTED_MODELS):
        assert not refusal({"architectures": [name]}), name


def config_of(directory: Path, name: str) -> dict[str, Any]:
    from services.engine.model_config import read_json

    read = read_json(write_config(directory, name) / "config.json")
    assert read is not None
    return dict(read)
