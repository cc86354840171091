"""What vLLM is started with, of the flags that are given: read by its own parser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvstore.block import ProofKey
from services.engine.choice import open_engine
from services.engine.config import EngineConfig
from services.engine.model_config import ModelNotFound
from tests.hf_models import write_model

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), "qwen2_wide")


def made(model: Path, engine_args: str, *, is_cpu: bool = True) -> Any:
    from services.engine.vllm.arguments import make_arguments, prepare_environment

    prepare_environment()
    config = EngineConfig(str(model), engine="vllm", engine_args=engine_args)
    return make_arguments(config, str(model), "float32", 1 << 20, is_cpu=is_cpu)


def test_on_a_cpu_nothing_is_compiled_and_torch_rotates(model: Path) -> None:
    arguments = made(model, "")
    assert (arguments.enforce_eager, arguments.compilation_config.custom_ops) == (True, ["-rotary_embedding"])
    assert arguments.use_tqdm_on_load is False


@pytest.mark.parametrize(
    "flags",
    [
        """-cc '{"mode":3}'""",
        """--compilation_config '{"mode":3}'""",
        "--compilation-config.mode 3",
        "-O3",
        "--optimization-level 3",
        "--no-enforce-eager",
    ],
)
def test_who_asks_for_compiling_gets_it_and_torch_rotates_all_the_same(model: Path, flags: str) -> None:
    arguments = made(model, flags)
    assert arguments.enforce_eager is False
    assert arguments.compilation_config.custom_ops == ["-rotary_embedding"]
    if "mode" in flags:
        assert int(arguments.compilation_config.mode) == 3


def test_who_names_the_kernel_that_rotates_gets_that_one(model: Path) -> None:
    flags = """--compilation-config '{"custom_ops":["+rotary_embedding"]}'"""
    assert made(model, flags).compilation_config.custom_ops == ["+rotary_embedding"]


def test_on_a_gpu_vllm_chooses(model: Path) -> None:
    arguments = made(model, "", is_cpu=False)
    assert (arguments.enforce_eager, arguments.compilation_config.custom_ops) == (False, [])


@pytest.mark.parametrize("flag", ["--use-tqdm-on-load", "--use_tqdm_on_load"])
def test_a_bar_is_shown_to_who_asks_for_it(model: Path, flag: str) -> None:
    assert made(model, flag).use_tqdm_on_load is True


def test_vllms_log_level_is_read_as_it_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.engine.vllm.arguments import prepare_environment

    monkeypatch.setitem(os.environ, "VLLM_LOGGING_LEVEL", "error")
    prepare_environment()


def test_pickled_weights_are_not_loaded_wherever_the_model_comes_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a snapshot in a cache that others share."""
    from services.engine.vllm import opening

    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    monkeypatch.setattr(opening, "find_model", lambda name, revision: tmp_path)
    with pytest.raises(ModelNotFound, match="pickled ones are never loaded"):
        open_engine(EngineConfig("somebody/model", engine="vllm"), ProofKey.public())
