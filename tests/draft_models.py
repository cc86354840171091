"""A model and its draft: random weights whose upper layers add little, and a model that has the lower ones alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_ADDS = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")


def damp_upper_layers(model: Path, num_lower: int, factor: float) -> Path:
    """Multiply what the layers from `num_lower` on add to the residual stream, in place. Returns `model`."""
    path = model / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith(_ADDS) and int(name.split(".")[2]) >= num_lower:
            weights[name] = weight * torch.tensor(factor, dtype=weight.dtype)
    save_file(weights, path, metadata={"format": "pt"})
    return model


def write_draft(directory: Path, model: Path, num_lower: int) -> Path:
    """Write the model of the lowest `num_lower` layers of `model`, with its embedding, last norm and head."""
    shutil.copytree(model, directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    raw["num_hidden_layers"] = num_lower
    if raw.get("layer_types"):
        raw["layer_types"] = raw["layer_types"][:num_lower]
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    weights = load_file(model / "model.safetensors")
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_lower
    }
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def permute_head(model: Path) -> Path:
    """Have each logit stand for another token, in place: what it says is never what it was. Returns `model`."""
    path = model / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).roll(1, dims=0)
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}), encoding="utf-8")
    save_file(weights, path, metadata={"format": "pt"})
    return model
