"""Writes safetensors files without torch: the tensors that a configuration calls for, all zeros."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from services.engine.checkpoint import expected_tensors
from services.engine.model_config import ModelConfig


def write_weights(directory: Path, config: ModelConfig, dtype: str = "F32") -> Path:
    """Write model.safetensors, in which every tensor is of safetensors' `dtype` ("F32", "BF16", "I8", …)."""
    return write_file(directory / "model.safetensors", expected_tensors(config), dtype)


def write_shards(directory: Path, config: ModelConfig, num_shards: int) -> list[Path]:
    """Write the weights as shards, with their index."""
    tensors, files = list(expected_tensors(config).items()), []
    weight_map = {}
    for index in range(num_shards):
        path = directory / f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        shard = dict(tensors[index::num_shards])
        files.append(write_file(path, shard))
        weight_map |= dict.fromkeys(shard, path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> Path:
    """Write one file of zeros, of which the disk keeps only the header."""
    item_bytes, start, header = {"F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1), 0, {}
    for name, shape in shapes.items():
        end = start + item_bytes * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return path
