"""Which engine computes: the whole table, what is refused, and in which words. No vLLM is needed for any of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.block import ProofKey
from services.cli.config import DEMO_MODEL, DoctorConfig
from services.cli.doctor.engine import check_engine
from services.cli.doctor.findings import Verdict
from services.engine import choice
from services.engine.check import Machine
from services.engine.choice import (
    check_model,
    check_vllm,
    choose,
    how_to_install,
    objection_to,
    open_engine,
    with_engine,
)
from services.engine.config import EngineConfig
from services.engine.model_config import ModelNotFound, NotComputed, UnsupportedModel
from services.machine import Gpu
from services.settings import SettingsError
from services.worker.config import WorkerConfig
from tests.hf_models import FOREIGN_FAMILIES, write_config

CPU = Machine(8 << 30, (), frozenset())
GPU = Machine(8 << 30, (Gpu("0", 80 << 30, 79 << 30),), frozenset())
QWEN = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
GEMMA = QWEN | {"architectures": ["Gemma3ForCausalLM"]}


def model(directory: Path, config: dict[str, object], weights: str = "model.safetensors") -> str:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / weights).touch()
    return str(directory)


@pytest.mark.parametrize(
    ("settings", "device", "objection", "engine"),
    [
        ({"engine": "native"}, "cuda", "it is a Gemma", "native"),
        ({"engine": "paced"}, "cuda", "", "paced"),
        ({"engine": "vllm"}, "cpu", "", "vllm"),
        ({"engine": "auto"}, "cpu", "", "native"),
        ({"engine": "auto"}, "cpu", "it is a Gemma", "vllm"),
        ({"engine": "auto"}, "cuda", "", "vllm"),
        ({"engine": "auto"}, "cuda", "it is a Gemma", "vllm"),
        ({"engine": "auto", "quantization": "int8"}, "cpu", "", "native"),
        ({"engine": "auto", "quantization": "awq"}, "cpu", "", "vllm"),
        ({"engine": "auto", "kv_cache_dtype": "int8"}, "cpu", "", "native"),
        ({"engine": "auto", "kv_cache_dtype": "fp8"}, "cpu", "", "vllm"),
    ],
)
def test_settings_device_and_model_choose_the_engine(
    settings: dict[str, str], device: str, objection: str, engine: str
) -> None:
    choice = choose(EngineConfig("m", **settings), device, objection)  # type: ignore[arg-type]
    assert choice.engine == engine
    assert choice.why
    assert objection in choice.why or settings["engine"] != "auto"


def test_the_device_that_a_worker_is_told_counts_not_the_one_there_is(tmp_path: Path) -> None:
    path = model(tmp_path, QWEN)
    assert with_engine(WorkerConfig(model=path, engine="auto"), CPU, None).engine == "native"
    assert with_engine(WorkerConfig(model=path, engine="auto", device="cpu"), GPU, None).engine == "native"
    assert with_engine(WorkerConfig(model=path, engine="auto"), GPU, "0.32.0").engine == "vllm"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, "architecture 'Gemma3ForCausalLM' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantized with awq"),
        ({"num_experts": 8}, "num_experts 8 is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    ],
)
def test_what_the_native_engine_does_not_compute_is_vllms(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    config = EngineConfig(model(tmp_path, QWEN | changes), engine="auto")
    assert says in objection_to(config)
    assert with_engine(config, CPU, "0.32.0+cpu").engine == "vllm"
    with pytest.raises(NotComputed, match="--engine vllm"):
        check_model(EngineConfig(config.model), CPU)


@pytest.mark.parametrize("family", FOREIGN_FAMILIES)
def test_a_family_that_the_native_engine_lacks_is_vllms_and_doctor_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    path = write_config(tmp_path, family)
    assert with_engine(EngineConfig(str(path), engine="auto"), CPU, "0.32.0+cpu").engine == "vllm"
    monkeypatch.setattr(choice, "vllm_version", lambda: "0.32.0+cpu")
    chosen, vllm = check_engine(DoctorConfig(model=str(path), engine="auto"))
    (architecture,) = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
    assert chosen.detail.startswith("vllm: the native engine does not compute the model: ")
    assert architecture in chosen.detail
    assert vllm.verdict is not Verdict.BROKEN


@pytest.mark.parametrize("config", [{"hidden_size": "many"}, {"architectures": 7}, {"num_attention_heads": 7}])
def test_a_damaged_model_is_nobodys(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        with_engine(EngineConfig(model(tmp_path, QWEN | config), engine="auto"), CPU, "0.32.0+cpu")


def test_a_vllm_that_was_built_here_for_cpus_is_one_for_cpus() -> None:
    check_vllm("0.32.1.dev5+gabc.cpu", "cpu", "it was asked for")


@pytest.mark.parametrize(
    ("version", "machine", "says"),
    [
        (None, CPU, r"vLLM is to compute \(.*Gemma3ForCausalLM.*\), and is not installed; make install-vllm"),
        (
            "0.30.2+cpu",
            CPU,
            r"vLLM 0\.30\.2\+cpu is installed, and Tandem was tested with >=0\.31,<0\.33; make install",
        ),
        ("0.33.0", GPU, r"vLLM 0\.33\.0 is installed, .* >=0\.31,<0\.33"),
        ("1.31", GPU, r"vLLM 1\.31 is installed"),
        ("dev", GPU, r"vLLM dev is installed"),
        ("0.32.0", CPU, r"vLLM 0\.32\.0 is built for GPUs, and is to compute on a CPU; install its CPU build"),
        ("0.32.0+cpu", GPU, r"vLLM 0\.32\.0\+cpu is built for CPUs, and is to compute on a GPU; give --device cpu"),
    ],
)
def test_a_vllm_that_cannot_serve_here_is_refused_with_the_remedy(
    tmp_path: Path, version: str | None, machine: Machine, says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        with_engine(EngineConfig(model(tmp_path, GEMMA), engine="auto"), machine, version)


def test_where_there_is_no_checkout_the_remedy_is_one_that_is_there(tmp_path: Path) -> None:
    assert "make" not in how_to_install(tmp_path)
    for remedy in ("tandem-serve[vllm]", "worker-vllm.Dockerfile", "--engine native"):
        assert remedy in how_to_install(tmp_path)
    (tmp_path / "Makefile").touch()
    assert how_to_install(tmp_path) == "make install-vllm"


@pytest.mark.parametrize("version", ["0.31.0", "0.31.1.post1", "0.32", "0.32.0rc1", "0.32.5+cu130"])
def test_a_tested_vllm_is_taken(version: str) -> None:
    check_vllm(version, "cuda", "")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "vllm", "enable_prefix_caching": False}, "a prompt that is handed over comes in as a prefix"),
        ({"engine": "vllm", "kv_offloading_size": 1.0}, "have no host tier; store nodes"),
        ({"engine": "vllm", "cpu_kernels": "torch"}, "kernels of its own"),
        ({"engine": "vllm", "quantization": "int8"}, "int8 is the native engine's"),
        ({"engine": "native", "quantization": "awq"}, "'awq' is not one of none, int8; --engine vllm has more"),
        (
            {"engine": "vllm", "kv_cache_dtype": "int8"},
            r"int8 is the native engine's; give one of vLLM's \(fp8, int8_per",
        ),
        ({"engine": "native", "kv_cache_dtype": "fp8"}, "'fp8' is not one of auto, int8; --engine vllm has more"),
        ({"engine": "paced", "kv_cache_dtype": "int8"}, "the simulation keeps words of its own"),
        ({"engine": "vllm", "engine_args": "--kv-cache-dtype fp8"}, "--kv-cache-dtype is a flag of Tandem's"),
        ({"engine": "native", "engine_args": "--enable-lora"}, "these are vLLM's flags; give --engine vllm"),
        ({"engine": "paced", "engine_args": "--enable-lora"}, "these are vLLM's flags"),
        ({"engine": "auto", "engine_args": "--kv-transfer-config {}"}, "--kv-transfer-config is refused"),
        ({"engine": "vllm", "engine_args": "-tp 0"}, "--tensor-parallel-size must be a number of GPUs"),
    ],
)
def test_settings_that_the_engine_has_not_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        EngineConfig("m", **settings)  # type: ignore[arg-type]


def test_flags_of_vllms_are_not_forgotten_where_auto_takes_the_native_engine(tmp_path: Path) -> None:
    config = EngineConfig(model(tmp_path, QWEN), engine="auto", engine_args="--enforce-eager")
    with pytest.raises(SettingsError, match=r"auto takes the native engine here: .*; give --engine vllm"):
        with_engine(config, CPU, "0.32.0+cpu")
    assert with_engine(config, GPU, "0.32.0").engine_args == "--enforce-eager"


def test_pickled_weights_are_not_vllms_either(tmp_path: Path) -> None:
    path = model(tmp_path, GEMMA, "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="pickled ones are never loaded"):
        check_model(EngineConfig(path, engine="vllm"), CPU)
    drawn = EngineConfig(path, engine="vllm", engine_args="--load-format=dummy")
    assert check_model(drawn, CPU) == tmp_path  # drawn as they are, they are not looked for


def test_auto_is_resolved_before_an_engine_is_opened() -> None:
    with pytest.raises(AssertionError, match="auto"):
        open_engine(EngineConfig(str(DEMO_MODEL), engine="auto"), ProofKey.public())
