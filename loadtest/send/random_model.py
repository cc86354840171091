"""Makes the random model that a load test serves: big enough that a prompt stalls whoever shares its worker.

    python -m loadtest.send.random_model build/loadtest/model

A Qwen2 of 0.1 B parameters in bfloat16, as `transformers` would save it, and a tokenizer that knows a word for each
token. Timing alone is meant: what it answers has no sense. A process of its own, since torch and a process that locust
has patched do not mix.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_COMPLETE = "config.json"
"""The file that is written last."""

_NEEDS = "making a random model takes torch, safetensors and tokenizers, as starting a stack does"

CONFIG: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "vocab_size": 16_000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "max_window_layers": 14,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


class ModelFailed(Exception):
    """The model could not be made; the message says why."""


def make_random_model(folder: Path) -> Path:
    """The model's folder, made now unless it is there from an earlier run. Raises ModelFailed."""
    made = _read_config(folder)
    if made != CONFIG:
        command = [sys.executable, "-m", "loadtest.send.random_model", str(folder)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise ModelFailed(f"no random model in {folder}: {last[0]}")
    return folder


def _read_config(folder: Path) -> object:
    try:
        return json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _COMPLETE).unlink(missing_ok=True)
    try:
        import torch
        from safetensors.torch import save_file
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ModuleNotFoundError as error:
        sys.exit(f"{_NEEDS}: no module {error.name}; pip install 'tandem-serve[all,loadtest]'")

    from loadtest.plan import word

    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in _shapes().items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            weights[name] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    vocabulary = {word(token_id): token_id for token_id in range(_size("vocab_size"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    (folder / _COMPLETE).write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")


def _shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Qwen2 with tied embeddings, by their names in a checkpoint."""
    hidden, inner, heads = _size("hidden_size"), _size("intermediate_size"), _size("num_attention_heads")
    kv = hidden // heads * _size("num_key_value_heads")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_size("vocab_size"), hidden)}
    for index in range(_size("num_hidden_layers")):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, size in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes | {"model.norm.weight": (hidden,)}


def _size(name: str) -> int:
    value = CONFIG[name]
    assert isinstance(value, int)
    return value


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
