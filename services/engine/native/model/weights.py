"""Reads a checkpoint: finds it, checks it against the configuration, reads it at memory speed.

Files are mapped, so nothing is read twice or held twice: each tensor goes from the page cache into the memory that the
model computes from, is converted on the way, and is hashed for the fingerprint while it is warm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.engine.model_config import ModelConfig, ModelNotFound, UnsupportedModel, read_json
from services.engine.native.model.fingerprint import FingerprintBuilder

_DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# What a snapshot from the hub needs: configuration, tokenizer, weights. Never pickled weights.
_HUB_PATTERNS: Final = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]

# Buffers that old checkpoints carry and everybody computes afresh.
_IGNORED: Final = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_LM_HEAD: Final = "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: which file has it, and what its header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a model directory, mapped read-only. Made by `open_checkpoint`."""

    def __init__(self, files: Mapping[Path, safe_open], tensors: Mapping[str, StoredTensor]) -> None:
        self._files = files
        self.tensors = tensors

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that lives in the mapped file: valid while the checkpoint is open, not to be written."""
        tensor: Tensor = self._files[self.tensors[name].file].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


def find_model(model: str, revision: str | None = None) -> Path:
    """Return the directory of `model`: itself where it is one, else a snapshot from the hub, downloaded if need be.

    Raises `ModelNotFound`.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"{model} is not a directory")
    from huggingface_hub import snapshot_download  # slow to import, and offline machines do without
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(f"{model} is no directory, and not to be had from the HuggingFace hub: {error}") from error


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """Map the checkpoint of `directory`: model.safetensors, or the shards that its index names.

    Raises `ModelNotFound` for missing files, `UnsupportedModel` for unreadable or contradictory ones.
    """
    with ExitStack() as stack:
        files: dict[Path, safe_open] = {}
        tensors: dict[str, StoredTensor] = {}
        for path in _weight_files(directory):
            _read_ahead(path)
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                files[path] = file
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    header = file.get_slice(name)
                    if name in tensors:
                        raise UnsupportedModel(f"tensor {name} is in {tensors[name].file.name} and in {path.name}")
                    tensors[name] = StoredTensor(path, header.get_dtype(), tuple(header.get_shape()))
            except SafetensorError as error:
                raise UnsupportedModel(f"{path} is not a safetensors file: {error}") from error
        yield Checkpoint(files, tensors)


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    raw = read_json(index)
    if raw is None:
        raise ModelNotFound(f"{directory} has neither {single.name} nor {index.name}; other formats are not read")
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise UnsupportedModel(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UnsupportedModel(f"{index} names {name!r}, which is not a file beside it")
        if not (directory / name).is_file():
            raise ModelNotFound(f"{directory} lacks {name}, which {index.name} names")
    return [directory / name for name in names]


def _read_ahead(path: Path) -> None:
    """Ask the system to fetch the whole file: page faults alone would read a cold disk in small pieces."""
    if hasattr(os, "posix_fadvise"):  # Linux
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the configuration calls for."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[_LM_HEAD] = (config.vocab_size, hidden)
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


def check_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Raise `UnsupportedModel` unless the checkpoint has exactly the tensors that the configuration calls for.

    With tied embeddings an output projection may be there all the same: then it is used, as `transformers` does.
    """
    expected = expected_tensors(config)
    if _LM_HEAD in stored:
        expected[_LM_HEAD] = (config.vocab_size, config.hidden_size)
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(name for name in stored.keys() - expected.keys() if not _IGNORED.fullmatch(name))
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if unexpected:
        problems.append(f"has unexpected {_some(unexpected)}")
    for name in sorted(expected.keys() & stored.keys()):
        tensor = stored[name]
        if tensor.shape != expected[name]:
            problems.append(f"has {name} of shape {list(tensor.shape)}, not {list(expected[name])}")
        if tensor.dtype not in _DTYPES:
            problems.append(f"has {name} of type {tensor.dtype}, which is not supported (only {', '.join(_DTYPES)})")
    if problems:
        raise UnsupportedModel(f"the checkpoint does not fit config.json: it {'; it '.join(problems[:5])}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of the embedding as stored: what a checkpoint is in whose configuration does not say."""
    return _DTYPES[checkpoint.tensors["model.embed_tokens.weight"].dtype]


class WeightReader:
    """Reads a checked checkpoint into the model's own memory, and fingerprints what it reads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        fingerprint: FingerprintBuilder,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[float], None] | None,
    ) -> None:
        """`dtype` and `device` are those of the tensors that `read` returns; `progress` is called with 0..1."""
        self._checkpoint = checkpoint
        self._fingerprint = fingerprint
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._num_left = sum(not _IGNORED.fullmatch(name) for name in checkpoint.tensors)
        self._num_tensors = self._num_left

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has this tensor."""
        return name in self._checkpoint.tensors

    @property
    def num_left(self) -> int:
        """Number of tensors not read yet."""
        return self._num_left

    def read(self, *names: str) -> Tensor:
        """Return the tensors stacked along their first dimension, each of which can be read once."""
        stored = [self._checkpoint.tensors[name] for name in names]
        num_rows = sum(tensor.shape[0] for tensor in stored)
        out = torch.empty((num_rows, *stored[0].shape[1:]), dtype=self._dtype, device=self._device)
        start = 0
        for name, header in zip(names, stored, strict=True):
            mapped = self._checkpoint.tensor(name)
            self._fingerprint.add(name, header.dtype, header.shape, mapped.reshape(-1).view(torch.uint8).numpy())
            out[start : start + header.shape[0]].copy_(mapped)
            start += header.shape[0]
            self._num_left -= 1
            if self._progress is not None:
                self._progress(1 - self._num_left / self._num_tensors)
        return out
