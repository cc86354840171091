"""Says which engine would compute the model on this machine, why that one, and whether it is there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from services.cli.config import DoctorConfig
from services.cli.doctor.findings import Finding, good, refused, worse
from services.cli.up import choose_model
from services.settings import SettingsError

if TYPE_CHECKING:
    from services.engine.config import EngineConfig


def engine_settings(config: DoctorConfig) -> EngineConfig:
    """The settings of a worker that is given the same flags. Raises SettingsError."""
    from services.engine.config import EngineConfig

    return EngineConfig(
        choose_model(config.model)[0],
        engine=config.engine,
        engine_args=config.engine_args,
        device=config.device,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        lora_modules=config.lora_modules,
        speculative_method=config.speculative_method,
        speculative_model=config.speculative_model,
    )


def check_engine(config: DoctorConfig) -> list[Finding]:
    """The engine that `--engine` comes to with the other flags; vLLM, and whether Tandem was tested with it."""
    from services.engine.check import Machine
    from services.engine.choice import (
        VLLM_VERSIONS,
        check_vllm,
        choose_engine,
        how_to_install,
        vllm_version,
        with_engine,
    )
    from services.engine.model_config import ModelError

    machine, installed = Machine.this(), vllm_version()
    try:
        settings = engine_settings(config)
        choice = choose_engine(settings, machine)
        by_itself = choose_engine(replace(settings, engine="auto"), machine)
    except (ModelError, SettingsError) as error:
        return [refused("engine", error)]
    would = "" if by_itself.engine == choice.engine else f"; auto would take {by_itself.engine}: {by_itself.why}"
    finding = good("engine", f"{choice.engine}: {choice.why}{would}")
    try:
        with_engine(settings, machine, installed)
    except SettingsError as error:
        return [finding, refused("vLLM" if error.setting == "engine" else "engine", error)]
    try:
        check_vllm(installed, machine.device(config.device), choice.why)
    except SettingsError as error:  # it is not asked for
        if installed is None:
            return [finding, good("vLLM", f"not installed; --engine vllm needs it: {how_to_install()}")]
        detail, _, remedy = str(error).rpartition("; ")
        return [finding, worse("vLLM", detail, remedy)]
    return [finding, good("vLLM", f"{installed}, one of {VLLM_VERSIONS}")]
