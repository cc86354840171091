"""Reads what a checkpoint's files say of themselves: which there are, whether they are whole, which tensors they hold.

Headers only, so it costs milliseconds whatever the model's size. No torch: `tandem up` asks before any worker starts,
and a worker before it loads.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.engine.model_config import ModelConfig, ModelNotFound, UnsupportedModel, read_json
from services.hub import NotOnHub, fetch, looks_like_path

STORED_DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What safetensors calls the types that are read, and what we call them."""

_MAX_HEADER_BYTES: Final = 100_000_000  # as the safetensors library has it
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"

# Buffers that old checkpoints carry and everybody computes afresh.
IGNORED_TENSORS: Final = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

LM_HEAD: Final = "lm_head.weight"

CONFIGURATION: Final = ("config.json", "generation_config.json")
WITHOUT_WEIGHTS: Final = ("*.json", "*.jinja", "tokenizer.model")
WHOLE_MODEL: Final = (*WITHOUT_WEIGHTS, "*.safetensors")
"""What a snapshot from the hub needs, by how much is wanted of it. Never pickled weights."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: which file has it, and what its header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_model(model: str, revision: str = "", files: Sequence[str] = WHOLE_MODEL) -> Path:
    """Return the directory of `model`: itself where it is one, else a snapshot from the hub, downloaded if need be.

    `files` are patterns: the files that are downloaded. Raises `ModelNotFound`.
    """
    directory = Path(model).expanduser()
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError as error:  # safetensors, the registry and JSON refuse it, each in its own way
        raise ModelNotFound(f"--model {model!a}: the path has bytes that are no UTF-8; rename it") from error
    if directory.is_dir():
        return directory
    if directory.suffix == ".gguf":
        raise ModelNotFound(f"{model} is GGUF, which is not read; take the repository that it was made from")
    if looks_like_path(model):
        what = "is a file, not a directory" if directory.exists() else "is not there"
        raise ModelNotFound(f"{model} {what}; give the directory of a model for transformers")
    try:
        return fetch(model, revision, files)
    except NotOnHub as error:
        raise ModelNotFound(str(error)) from error


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return the tensors of `directory` by name: of model.safetensors, or of the shards that its index names.

    Raises `ModelNotFound` for missing files, `UnsupportedModel` for damaged or contradictory ones.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise UnsupportedModel(f"{path}: tensor {name} is in {tensors[name].file.name} and in {path.name}")
            tensors[name] = tensor
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """Return the files with weights, all of them there. Raises `ModelNotFound`, `UnsupportedModel`."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    raw = read_json(index)
    if raw is None:
        raise ModelNotFound(f"{directory} has neither {single.name} nor {index.name}: {_instead(directory)}")
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise UnsupportedModel(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UnsupportedModel(f"{index} names {name!r}, which is not a file beside it")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelNotFound(
            f"{directory} lacks {some(missing)} of the {len(names)} files that {index.name} names; download them"
        )
    return [directory / name for name in names]


def safetensors_files(directory: Path) -> list[Path]:
    """Return the safetensors there, for an engine that reads them by itself. Raises `ModelNotFound`."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelNotFound(f"{directory} has no weights in safetensors; pickled ones are never loaded: convert them")
    return files


def _instead(directory: Path) -> str:
    """What the directory has in the place of safetensors, and what to do about it."""
    for pattern, what in (
        ("*.gguf", "GGUF is not read; take the repository that it was made from"),
        ("*.bin", "pickled weights are never loaded; convert them with save_pretrained of transformers"),
        ("*.pt*", "pickled weights are never loaded; convert them with save_pretrained of transformers"),
        ("*.safetensors", "other names are not read; a model for transformers has these"),
    ):
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            return f"it has {some(found)}, and {what}"
    return "it has no weights; download them"


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file, whose size must be what its header says.

    The format: the header's length in 8 bytes, the header as JSON, the tensors' bytes.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if start and _LFS_POINTER.startswith(start):
                raise UnsupportedModel(f"{path} is a pointer of git-lfs, not the file; run `git lfs pull` beside it")
            if not 2 <= length <= _MAX_HEADER_BYTES or 8 + length > size_bytes:
                raise UnsupportedModel(
                    f"{path} is not a safetensors file, or cut short ({size_bytes:,} bytes); download it again"
                )
            header = json.loads(file.read(length))
            tensors = {name: _tensor(path, entry) for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{path} has a damaged header ({error}); download it again") from error
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error
    end = 8 + length + max((end for _, end in tensors.values()), default=0)
    if size_bytes != end:
        how = "is cut short" if size_bytes < end else "is longer than its header says"
        raise UnsupportedModel(f"{path} {how}: {size_bytes:,} bytes instead of {end:,}; download it again")
    return {name: tensor for name, (tensor, _) in tensors.items()}


def _tensor(path: Path, entry: Mapping[str, object]) -> tuple[StoredTensor, int]:
    """One entry of a header, and where in the file's data it ends."""
    _, end = _numbers(entry["data_offsets"])
    return StoredTensor(path, str(entry["dtype"]), _numbers(entry["shape"])), end


def _numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(number, int) and number >= 0 for number in value):
        raise ValueError(f"{value!r:.100} where a list of numbers belongs")
    return tuple(value)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the configuration calls for."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        projections = [
            ("self_attn.q_proj", query, hidden, config.qkv_bias),
            ("self_attn.k_proj", key, hidden, config.qkv_bias),
            ("self_attn.v_proj", key, hidden, config.qkv_bias),
            ("self_attn.o_proj", hidden, query, config.o_bias),
            ("mlp.gate_proj", inner, hidden, config.mlp_bias),
            ("mlp.up_proj", inner, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, inner, config.mlp_bias),
        ]
        for name, num_out, num_in, has_bias in projections:
            shapes[f"{prefix}{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (num_out,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (d,)
            shapes[prefix + "self_attn.k_norm.weight"] = (d,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights that the configuration calls for."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def check_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig, directory: Path) -> None:
    """Raise `UnsupportedModel` unless the checkpoint has exactly the tensors that the configuration calls for.

    With tied embeddings an output projection may be there all the same: then it is used, as `transformers` does.
    """
    expected = expected_tensors(config)
    if LM_HEAD in stored:
        expected[LM_HEAD] = (config.vocab_size, config.hidden_size)
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(name for name in stored.keys() - expected.keys() if not IGNORED_TENSORS.fullmatch(name))
    problems = []
    if missing:
        problems.append(f"lacks {some(missing)}")
    if unexpected:
        problems.append(f"has unexpected {some(unexpected)}")
    for name in sorted(expected.keys() & stored.keys()):
        tensor = stored[name]
        if tensor.shape != expected[name]:
            problems.append(f"has {name} of shape {list(tensor.shape)}, not {list(expected[name])}")
        if tensor.dtype not in STORED_DTYPES:
            types = ", ".join(STORED_DTYPES)
            problems.append(f"has {name} of type {tensor.dtype}, which is not supported (only {types})")
    if problems:
        raise UnsupportedModel(
            f"{directory}: the weights do not fit config.json: they are of another model, or quantized; "
            f"the checkpoint {'; it '.join(problems[:3])}"
        )


def stored_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the dtype of the embedding as stored: what a checkpoint is in whose configuration does not say."""
    return STORED_DTYPES[tensors["model.embed_tokens.weight"].dtype]


def some(names: list[str]) -> str:
    """Up to three of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
