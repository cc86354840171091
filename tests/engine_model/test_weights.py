"""Checkpoints: sharded or not, complete and of the right shape or refused, and fingerprinted down to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from services.engine.checkpoint import find_model
from services.engine.model_config import ModelError, ModelNotFound, UnsupportedModel
from services.engine.native.model.fingerprint import tensor_digest
from services.engine.native.model.model import LoadedModel, load_model
from tests.engine_model.paged_run import PagedRun
from tests.hf_models import random_prompts

ModelDir = Callable[..., Path]
Change = Callable[[dict[str, torch.Tensor]], object]

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def changed(model_dir: ModelDir, tmp_path: Path) -> Callable[..., Path]:
    """Copies the qwen2 model with its tensors or its config changed."""

    def copy(change: Change = lambda tensors: None, family: str = "qwen2", **config: Any) -> Path:
        path = shutil.copytree(model_dir(family), tmp_path / "model", dirs_exist_ok=True)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(raw | config))
        return path

    return copy


def test_sharding_changes_neither_logits_nor_fingerprint(
    model_dir: ModelDir, loaded: Callable[..., LoadedModel]
) -> None:
    path = model_dir("qwen3", max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    sharded, whole = load_model(str(path)), loaded("qwen3")
    assert sharded.fingerprint == whole.fingerprint
    (token_ids,) = random_prompts([50])
    assert torch.equal(PagedRun(sharded).whole(token_ids), PagedRun(whole).whole(token_ids))


def test_progress_goes_from_0_to_1(model_dir: ModelDir) -> None:
    seen: list[float] = []
    load_model(str(model_dir("qwen2")), progress=seen.append)
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.1
    assert seen[-1] == 1


def test_the_model_says_what_it_is(model_dir: ModelDir) -> None:
    model = load_model(str(model_dir("mistral", dtype="bfloat16")), max_model_len=100)
    layout = model.block_layout(32)
    kv_cache = model.new_kv_cache(3, 32)
    assert (model.dtype, model.device, model.max_model_len, model.eos_token_ids) == ("bfloat16", "cpu", 100, (2, 0))
    assert kv_cache.shape == (3, layout.num_layers, 2, layout.num_kv_heads, 32, layout.head_dim)
    assert kv_cache.nbytes == 3 * layout.block_bytes
    assert layout.model_fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), f"lacks {Q_PROJ}"),
        (lambda t: t.pop("lm_head.weight"), r"lacks lm_head\.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)}), r"unexpected model\.layers\.3"),
        (lambda t: t.update({Q_PROJ: torch.zeros(64, 32)}), rf"{Q_PROJ} of shape \[64, 32\], not \[64, 64\]"),
        (lambda t: t.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}), f"{Q_PROJ} of type I8"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    change: Change, message: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load_model(str(changed(change)))


def test_stale_rotary_buffers_are_ignored(changed: Callable[..., Path], loaded: Callable[..., LoadedModel]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = changed(lambda t: t.update({name: torch.zeros(8)}))
    assert load_model(str(path)).fingerprint == loaded("qwen2").fingerprint


def test_an_output_projection_is_used_although_embeddings_are_tied(changed: Callable[..., Path]) -> None:
    plain = changed(family="qwen2_tied")
    (token_ids,) = random_prompts([20])
    tied = PagedRun(load_model(str(plain))).whole(token_ids)
    path = changed(lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}), family="qwen2_tied")
    torch.testing.assert_close(PagedRun(load_model(str(path))).whole(token_ids), 2 * tied, rtol=0, atol=1e-4)


def test_missing_files_are_named(model_dir: ModelDir, tmp_path: Path) -> None:
    path = shutil.copytree(model_dir("qwen3", max_shard_size="60KB"), tmp_path / "model")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelNotFound, match=shard.name):
        load_model(str(path))
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        load_model(str(path))


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd"])
def test_an_index_cannot_reach_outside_its_directory(name: str, model_dir: ModelDir, tmp_path: Path) -> None:
    path = shutil.copytree(model_dir("qwen2"), tmp_path / "model")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UnsupportedModel, match="not a file beside it"):
        load_model(str(path))


def test_a_truncated_checkpoint_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    path = shutil.copytree(model_dir("qwen2"), tmp_path / "model")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UnsupportedModel, match=r"model.safetensors is cut short"):
        load_model(str(path))


def test_a_tensor_in_two_shards_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    path = shutil.copytree(model_dir("qwen2"), tmp_path / "model")
    shutil.copy(path / "model.safetensors", path / "a.safetensors")
    (path / "model.safetensors").rename(path / "b.safetensors")
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnsupportedModel, match=r"is in a\.safetensors and in b\.safetensors"):
        load_model(str(path))


@pytest.mark.parametrize("model", ["/no/such/dir", "./no-such-dir", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(model: str) -> None:
    with pytest.raises(ModelNotFound, match="is not there; give the directory"):
        load_model(model)


def test_a_name_that_the_hub_cannot_give_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelNotFound, match=r"some/model.*offline"):
        find_model("some/model")


def test_hub_names_are_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend([name, revision, allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("some/model", "v1") == tmp_path
    assert asked[:2] == ["some/model", "v1"]
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int4"}, "int4"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "mps"}, "mps"),
        ({"device": "cuda:63"}, "cuda:63"),
        ({"max_model_len": 2049}, "2049.*2048"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str, model_dir: ModelDir) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(model_dir("qwen2")), **settings)


# -- fingerprint ------------------------------------------------------------------------------------------------------


def flip_bit(name: str, index: int, bit: int) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1).view(torch.int32)[index] ^= 1 << bit if bit < 31 else -(1 << 31)

    return change


def swap(a: str, b: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


CHANGES: dict[str, Change] = {
    "lowest bit of the first weight": flip_bit(Q_PROJ, 0, 0),
    "sign of the last weight": flip_bit(Q_PROJ, -1, 31),
    "one bit of a norm": flip_bit("model.norm.weight", 5, 10),
    "one bit of a bias": flip_bit("model.layers.2.self_attn.v_proj.bias", 0, 3),
    "one bit of the embedding": flip_bit("model.embed_tokens.weight", 12345, 20),
    "the signs of all weights of a tensor": lambda t: t[Q_PROJ].neg_(),
    "the sign of every second weight": lambda t: t[Q_PROJ].view(-1)[1::2].neg_(),
    "the signs of two weights": lambda t: t[Q_PROJ].view(-1)[1:4:2].neg_(),
    "two layers swapped": swap("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    "two weights swapped": lambda t: t[Q_PROJ][0, :2].copy_(t[Q_PROJ][0, :2].flip(0).clone()),
    "two rows swapped": lambda t: t[Q_PROJ][:2].copy_(t[Q_PROJ][:2].flip(0).clone()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_of_a_weight_changes_the_fingerprint(
    name: str, changed: Callable[..., Path], loaded: Callable[..., LoadedModel]
) -> None:
    assert load_model(str(changed(CHANGES[name]))).fingerprint != loaded("qwen2").fingerprint


@pytest.mark.parametrize(
    "config",
    [
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_001.0}},
        {"use_sliding_window": True, "sliding_window": 50, "layer_types": ["sliding_attention"] * 3},
    ],
)
def test_settings_that_change_the_computation_change_the_fingerprint(
    config: dict[str, Any], changed: Callable[..., Path], loaded: Callable[..., LoadedModel]
) -> None:
    assert load_model(str(changed(**config))).fingerprint != loaded("qwen2").fingerprint


def test_the_dtype_changes_the_fingerprint(model_dir: ModelDir) -> None:
    path = str(model_dir("qwen2"))
    assert len({load_model(path, dtype=dtype).fingerprint for dtype in ("float32", "bfloat16", "float16")}) == 3


@pytest.mark.parametrize(
    "config", [{"max_position_embeddings": 4096}, {"eos_token_id": 7}, {"transformers_version": "4"}, {}]
)
def test_settings_that_leave_keys_and_values_alone_leave_the_fingerprint_alone(
    config: dict[str, Any], changed: Callable[..., Path], loaded: Callable[..., LoadedModel]
) -> None:
    assert load_model(str(changed(**config))).fingerprint == loaded("qwen2").fingerprint


@given(st.binary(max_size=200), st.integers(min_value=0), st.integers(0, 7))
def test_the_digest_depends_on_every_bit_and_on_the_length(data: bytes, where: int, bit: int) -> None:
    original = np.frombuffer(data, dtype=np.uint8)
    digest = tensor_digest(original)
    assert tensor_digest(original.copy()) == digest
    assert tensor_digest(np.append(original, np.uint8(0))) != digest
    if data:
        flipped = original.copy()
        flipped[where % len(data)] ^= 1 << bit
        assert tensor_digest(flipped) != digest


def test_the_digest_covers_tensors_of_many_rows_and_unaligned_memory() -> None:
    raw = np.random.default_rng(0).integers(0, 256, size=3_000_001, dtype=np.uint8)
    data = raw[1:]
    digest = tensor_digest(data)
    assert digest == tensor_digest(data.copy())
    for index in (0, 70_000, 1_048_575, 1_048_576, 2_999_999):
        data[index] ^= 1
        assert tensor_digest(data) != digest
        data[index] ^= 1
    words = data[:2_999_992].copy()
    words[[7, 15]] ^= 128  # the top bits of two words of one row
    assert tensor_digest(words) != tensor_digest(data[:2_999_992])
