"""Reads and checks config.json: the part of it that decides what is computed.

`transformers` is the reference: a key that its class does not read is ignored here too, an absent key has its default
there. What would need code that we lack is refused by name when the worker starts. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from services.engine.refused import refusal

DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES: Final = tuple(DTYPE_BYTES)
HIDDEN_ACTIVATIONS: Final = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh")

Json = Mapping[str, object]


class ModelError(Exception):
    """Base of all errors about a model: its directory, its configuration, its weights."""


class ModelNotFound(ModelError):
    """The model, or a file that it must have, is not there."""


class UnsupportedModel(ModelError):
    """The model asks for something that is not computed, or its files contradict each other."""


class NotComputed(UnsupportedModel):
    """The native engine does not compute this model; another one may."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, every default resolved. Fields that `rope_type` does not use keep theirs."""

    rope_type: Literal["default", "linear", "llama3", "yarn"]
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # scales cos and sin; yarn only


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer of the Llama shape: what is computed, and nothing else.

    Each layer is `x += o(attend(rope(qkv(norm(x))))); x += down(act(gate(norm(x))) * up(norm(x)))`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]  # per layer: keys a token sees, itself included; None: all
    dtype: str | None  # what the checkpoint says of itself
    eos_token_ids: tuple[int, ...]

    @property
    def max_context_len(self) -> int:
        """Longest context in tokens that the positions are made for.

        Like vLLM: `linear` stretches max_position_embeddings by its factor, `yarn` the original length, where configs
        in the wild disagree about which of the two max_position_embeddings is.
        """
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings


@dataclass(frozen=True)
class _Family:
    """The defaults of `transformers` for keys that config.json lacks, and the class's biases and norms."""

    max_position_embeddings: int
    num_key_value_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: hidden_size / num_attention_heads
    eos_token_id: int | None
    qkv_bias: bool | None  # None: as `attention_bias` says, for the output projection too
    mlp_bias: bool | None  # None: as `mlp_bias` says
    qk_norm: bool
    windows: Literal["none", "all", "by_layer"]  # which layers `sliding_window` is for


_FAMILIES: Final[Mapping[str, _Family]] = {
    "LlamaForCausalLM": _Family(2048, None, None, 2, None, None, qk_norm=False, windows="none"),
    "MistralForCausalLM": _Family(131072, 8, None, 2, False, False, qk_norm=False, windows="all"),
    "Qwen2ForCausalLM": _Family(32768, 32, None, None, True, False, qk_norm=False, windows="by_layer"),
    "Qwen3ForCausalLM": _Family(32768, 32, 128, None, None, False, qk_norm=True, windows="by_layer"),
}

SUPPORTED_ARCHITECTURES: Final = tuple(_FAMILIES)

# Settings of other architectures that change the result: refused unless they have a value that means "off".
_REFUSED_UNLESS_OFF: Final = (
    "quantization_config",
    "compression_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "clip_qkv",
    "num_experts",
    "num_local_experts",
    "use_mrope",
    "no_rope_layers",
)


def read_config(directory: Path) -> ModelConfig:
    """Read config.json and, for the end-of-sequence tokens, generation_config.json.

    Raises `ModelNotFound` where there is no config.json, `UnsupportedModel` where it cannot be served.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if raw is None:
        raise ModelNotFound(f"{directory} has no config.json: {_instead(directory)}")
    generation = read_json(directory / "generation_config.json")
    try:
        return parse_config(raw, generation)
    except NotComputed as error:
        if why := refusal(raw):
            raise UnsupportedModel(f"{path}: {why}") from error
        remedy = ", or give --engine vllm" if "; " in str(error) else "; give --engine vllm"
        raise NotComputed(f"{path}: {error}{remedy}") from error
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from error


def _instead(directory: Path) -> str:
    """What the directory is, if not a model for transformers, and what to do about it."""
    if list(directory.glob("*.gguf")):
        return "GGUF is not read; take the repository that it was made from"
    if (directory / "adapter_config.json").is_file():
        return "it is an adapter (LoRA), not a model; merge it into its base model"
    if (directory / "params.json").is_file():
        return "these are weights in their maker's own format; take the repository for transformers"
    return "it is not the directory of a model for transformers; correct the path"


def parse_config(raw: Json, generation: Json | None = None) -> ModelConfig:
    """Resolve the contents of config.json and generation_config.json. Raises `UnsupportedModel`, naming the setting."""
    architecture = _architecture(raw)
    family = _FAMILIES[architecture]
    for name in _REFUSED_UNLESS_OFF:
        if raw.get(name) not in (None, False, 0, [], {}):
            raise NotComputed(_refusal(name, raw[name]))
    num_layers = _integer(raw, "num_hidden_layers")
    num_heads = _integer(raw, "num_attention_heads")
    hidden_size = _integer(raw, "hidden_size")
    num_kv_heads = _integer(raw, "num_key_value_heads", family.num_key_value_heads or num_heads, null=num_heads)
    derived_head_dim = hidden_size // num_heads
    head_dim = _integer(raw, "head_dim", family.head_dim or derived_head_dim, null=derived_head_dim)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise UnsupportedModel(f"head_dim {head_dim} is odd: rotary embedding needs pairs")
    hidden_act = raw.get("hidden_act", "silu")
    if hidden_act not in HIDDEN_ACTIVATIONS:
        raise NotComputed(f"hidden_act {hidden_act!r} is not supported (only {', '.join(HIDDEN_ACTIVATIONS)})")
    max_position_embeddings = _integer(raw, "max_position_embeddings", family.max_position_embeddings)
    attention_bias = _boolean(raw, "attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_act=str(hidden_act),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_position_embeddings,
        rope=_rope(raw, max_position_embeddings),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=_boolean(raw, "mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        tie_word_embeddings=_boolean(raw, "tie_word_embeddings", False),
        sliding_windows=_sliding_windows(raw, family, num_layers),
        dtype=_dtype(raw),
        eos_token_ids=_eos_token_ids(raw, generation, family),
    )


def _refusal(name: str, value: object) -> str:
    if name not in ("quantization_config", "compression_config"):
        return f"{name} {value!r:.100} is not supported; choose a model without it"
    method = value.get("quant_method", "?") if isinstance(value, Mapping) else value
    return (
        f"weights quantized with {method!s:.40} ({name}) are not read; take the repository that they were made from "
        "(--quantization int8 computes it in 8 bits, on CPUs)"
    )


def _architecture(raw: Json) -> str:
    names = raw.get("architectures")
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != 1:
        raise UnsupportedModel(f"must name one architecture under `architectures`, not {names!r:.100}")
    if names[0] not in _FAMILIES:
        raise NotComputed(
            f"architecture {names[0]!r:.100} is not supported; choose one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return str(names[0])


def _sliding_windows(raw: Json, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    if family.windows == "none":
        return (None,) * num_layers
    window = None if raw.get("sliding_window", 4096) is None else _integer(raw, "sliding_window", 4096)
    if family.windows == "all":
        only = "full_attention" if window is None else "sliding_attention"
        if set(_layer_types(raw, num_layers) or [only]) != {only}:
            raise NotComputed("layer_types that alternate are not supported for MistralForCausalLM")
        return (window,) * num_layers
    if not _boolean(raw, "use_sliding_window", False):
        window = None
    layer_types = _layer_types(raw, num_layers)
    if layer_types is None:
        first = _integer(raw, "max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if window is None and "sliding_attention" in layer_types:
        raise UnsupportedModel("layer_types has sliding_attention layers, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _layer_types(raw: Json, num_layers: int) -> list[str] | None:
    value = raw.get("layer_types")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != num_layers:
        raise UnsupportedModel(f"layer_types must list {num_layers} layers, not {value!r:.100}")
    for kind in value:
        if kind not in ("full_attention", "sliding_attention"):
            raise NotComputed(f"layer_types has {kind!r:.100}, which is not supported")
    return value


def _rope(raw: Json, max_position_embeddings: int) -> RopeConfig:
    """Read both spellings: `rope_scaling` beside `rope_theta`, and `rope_parameters` (transformers 5)."""
    value = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(value, Mapping):
        raise UnsupportedModel(f"rope parameters must be an object, not {value!r:.100}")
    rope: Json = value
    if any(isinstance(item, Mapping) for item in rope.values()):
        raise NotComputed(f"rope_parameters per layer type ({', '.join(map(str, rope))}) are not supported")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise NotComputed(f"partial_rotary_factor {partial!r:.100} is not supported")
    theta = _number(rope, "rope_theta", _number(raw, "rope_theta", 10_000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return RopeConfig("default", theta)
    if rope_type == "linear":
        return RopeConfig("linear", theta, factor=_number(rope, "factor"))
    original = _integer(rope, "original_max_position_embeddings", max_position_embeddings)
    original = _integer(raw, "original_max_position_embeddings", original)
    if rope_type == "llama3":
        return RopeConfig(
            "llama3",
            theta,
            factor=_number(rope, "factor"),
            original_max_position_embeddings=original,
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
        )
    if rope_type == "yarn":
        factor = _number(rope, "factor", max_position_embeddings / original)
        return RopeConfig(
            "yarn",
            theta,
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=_number(rope, "beta_fast", 32.0),
            beta_slow=_number(rope, "beta_slow", 1.0),
            truncate=_boolean(rope, "truncate", True),
            attention_factor=_yarn_attention_factor(rope, factor),
        )
    raise NotComputed(f"rope type {rope_type!r:.100} is not supported (only default, linear, llama3, yarn)")


def _yarn_attention_factor(rope: Json, factor: float) -> float:
    """How much cos and sin grow: YaRN's sqrt(1/t) = 0.1 ln(s) + 1 (Peng et al. 2023, equation 22), as transformers."""

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    mscale, mscale_all_dim = _number(rope, "mscale", 0.0), _number(rope, "mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)


def _dtype(raw: Json) -> str | None:
    value = raw.get("dtype", raw.get("torch_dtype"))
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise NotComputed(f"dtype {name!r:.100} is not supported (only {', '.join(DTYPES)})")
    return name


def _eos_token_ids(raw: Json, generation: Json | None, family: _Family) -> tuple[int, ...]:
    value = (generation or {}).get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id", family.eos_token_id)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise UnsupportedModel(f"eos_token_id must be a token id or a list of them, not {value!r:.100}")
    return tuple(ids)


def _integer(raw: Json, name: str, default: int | None = None, *, null: int | None = None, minimum: int = 1) -> int:
    """Return an integer setting: `default` where the key is absent, `null` (else `default`) where its value is null."""
    value = raw.get(name)
    if value is None:
        value = null if name in raw and null is not None else default
    if value is None:
        raise UnsupportedModel(f"lacks {name}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UnsupportedModel(f"{name} must be an integer of at least {minimum}, not {value!r:.100}")
    return value


def _number(raw: Json, name: str, default: float | None = None) -> float:
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedModel(f"lacks {name}")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise UnsupportedModel(f"{name} must be a number of at least 0, not {value!r:.100}")
    return float(value)


def _boolean(raw: Json, name: str, default: bool) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UnsupportedModel(f"{name} must be true or false, not {value!r:.100}")
    return value


def read_json(path: Path) -> Json | None:
    """Return the object in `path`, or None where there is no such file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error}") from error
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} must hold a JSON object")
    return value


def said_dtype(directory: Path) -> str:
    """The type of its weights that a model of whatever architecture says; `auto` where it says none."""
    raw = read_json(directory / "config.json") or {}
    text = raw.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    names = (raw.get("dtype"), raw.get("torch_dtype"), inner.get("dtype"), inner.get("torch_dtype"))
    return str(next(filter(None, names), "auto")).removeprefix("torch.")
