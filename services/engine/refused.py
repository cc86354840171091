"""Models that are not served, known by config.json before anything is loaded: why, and what to do. No torch.

A handoff moves blocks of keys and values, which the tokens before them make and name. What is not known here is
refused when vLLM has looked at the model, in its words, or when its cache is found to be something else than blocks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

ALL_WINDOWS: Final = (
    "all its layers have a sliding window, and vLLM drops the blocks behind it; up to the window's length"
    """ --hf-overrides '{"sliding_window":null}' --max-model-len (the window) computes the same"""
)
MORE_THAN_TEXT: Final = (
    "it takes images, sound or video, and a block is known by its tokens, which do not tell two images apart; take its"
    " language model by itself (…ForCausalLM)"
)
_ENCODER: Final = (
    "its decoder reads what an encoder made of another text, which no block holds; take a model of a decoder alone"
    " (…ForCausalLM)"
)
_RECURRENT: Final = (
    "its layers keep a state that each token overwrites, beside keys and values or instead of them, and a block holds"
    " those of its tokens alone; take a model with attention on all layers"
)
_NO_TEXT: Final = "it makes embeddings, scores or classes, and text is what is served; take a model that makes text"
_WITHOUT_TANDEM: Final = "or serve it by vLLM alone, without a handoff"

_RECURRENT_LAYERS: Final = re.compile("mamba|linear|conv|recurrent|ssm|gdn|kda|hybrid")
_RECURRENT_KEYS: Final = re.compile(
    "mamba_|ssm_|conv_L_cache|hybrid_override_pattern|linear_(attn_config|conv_kernel_dim)"
)
_RECURRENT_TYPES: Final = re.compile("mamba|jamba|bamba|rwkv|recurrent|xlstm")
_SENSES: Final = re.compile("(vision|visual|audio|image|video|speech|thinker)_(.*_)?(config|tower)")
_NO_TEXT_NAMES: Final = re.compile(
    ".*((?<!LMHead)(?<!LM)(?<!Chat)Model|For(MaskedLM|(Sequence|Token)Classification|QuestionAnswering|Retrieval))"
)

Json = Mapping[str, object]


def refusal(config: Json) -> str:
    """Why no engine serves a model of that config.json, and what to do; empty where there may be one that does."""
    why = _why(config)
    return f"{_architecture(config) or config.get('model_type', 'it')!s:.100}: {why}, {_WITHOUT_TANDEM}" if why else ""


def refusal_by_vllm(config: Json, engine_args: Collection[str]) -> str:
    """The same of vLLM behind the port, with the flags of its own that change what is in blocks."""
    if any(each.startswith("--hf-overrides") for each in engine_args):
        return ""  # it reads another configuration than we do
    has_windows = _has_windows_only(config) and "--disable-sliding-window" not in engine_args
    return refusal(config) or (f"{_architecture(config)}: {ALL_WINDOWS}" if has_windows else "")


def _why(config: Json) -> str:
    architecture = _architecture(config)
    if config.get("is_encoder_decoder") is True:
        return _ENCODER
    # A language model may have been cut out of a larger one, and its configuration say so still.
    if not architecture.endswith("ForCausalLM") and any(map(_SENSES.fullmatch, config)):
        return MORE_THAN_TEXT
    if _NO_TEXT_NAMES.fullmatch(architecture):
        return _NO_TEXT
    return _RECURRENT if _is_recurrent(config) else ""


def _is_recurrent(config: Json) -> bool:
    layers = _layers(config)
    if layers:  # some that could be are not: Granite 4.0 Micro
        return any(map(_RECURRENT_LAYERS.match, layers))
    is_one = _RECURRENT_TYPES.search(str(config.get("model_type", "")))
    return bool(is_one) or any(map(_RECURRENT_KEYS.match, config))


def _has_windows_only(config: Json) -> bool:
    if not isinstance(config.get("sliding_window"), int):
        return False
    layers = _layers(config)
    return set(layers) == {"sliding_attention"} if layers else config.get("model_type") == "mistral"


def _layers(config: Json) -> list[str]:
    kinds = config.get("layer_types") or config.get("layers_block_type") or []
    return list(map(str, kinds)) if isinstance(kinds, Sequence) and not isinstance(kinds, str) else []


def _architecture(config: Json) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, Sequence) and not isinstance(names, str) and names else ""
