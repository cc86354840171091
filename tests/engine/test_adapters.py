"""Adapters as --lora-modules names them, and engines that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.engine.adapters import parse_modules, read_adapters
from services.engine.choice import choose
from services.engine.config import EngineConfig
from services.engine.limits import check_abilities
from services.engine.request import InvalidRequest, Request, SamplingParams
from services.settings import SettingsError, block_meaning


def write_files(directory: Path, weights: bytes, config: str = "{}") -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(config, encoding="utf-8")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def test_modules_are_spelled_as_vllm_spells_them() -> None:
    as_json = json.dumps({"name": "b", "path": "/x=y", "base_model_name": "m"})
    assert parse_modules(("a=/p=q", as_json)) == {"a": "/p=q", "b": "/x=y"}


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (("a",), "name=path"),
        (("a=",), "name=path"),
        (("=p",), "name=path"),
        (("a=p", "a=q"), "twice"),
        (("{oops",), "JSON"),
        (('{"name": "a", "path": "p", "rank": 8}',), "rank"),
        (('{"name": "a"}',), "name=path"),
    ],
)
def test_other_modules_are_refused(modules: tuple[str, ...], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        EngineConfig("m", engine="vllm", lora_modules=modules)


def test_a_key_has_the_name_and_changes_with_each_file(tmp_path: Path) -> None:
    directories = [
        write_files(tmp_path / "1", b"weights"),
        write_files(tmp_path / "2", b"other weights"),
        write_files(tmp_path / "3", b"weights", '{"r": 8}'),
        write_files(tmp_path / "4", b"weights"),
    ]
    keys = [read_adapters((f"a:b={directory}",))[0].key for directory in directories]
    assert {key.rpartition(":")[0] for key in keys} == {"a:b"}
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


def test_pickled_weights_are_no_adapter(tmp_path: Path) -> None:
    directory = write_files(tmp_path / "a", b"weights")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(SettingsError, match=r"a: an adapter .*adapter_model\.safetensors"):
        read_adapters((f"a={directory}",))


@pytest.mark.parametrize(
    "flag", ["--lora-target-modules q_proj k_proj", "--enable-moe-shared-loras", "--lora-dtype half"]
)
def test_flags_that_change_what_an_adapter_computes_make_other_blocks(flag: str) -> None:
    assert block_meaning(flag) == (flag,)


def test_the_native_engine_has_no_adapters() -> None:
    with pytest.raises(SettingsError, match="engine vllm"):
        EngineConfig("m", engine="native", lora_modules=("a=p",))
    assert choose(EngineConfig("m", engine="auto", lora_modules=("a=p",)), "cpu", "").engine == "vllm"
    request = Request("r", [1], SamplingParams(), adapter="a:00")
    with pytest.raises(InvalidRequest, match="model: adapter a:00 is not here; there is none"):
        check_abilities(request, ())
