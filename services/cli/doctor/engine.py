"""Says which engine would compute the model on this machine, why that one, and whether it is there."""

from __future__ import annotations

from dataclasses import replace

from services.cli.doctor.findings import Finding, good, refused, worse
from services.cli.up import choose_model
from services.settings import SettingsError


def check_engine(model: str, engine: str) -> list[Finding]:
    """The engine that `--engine` comes to; vLLM, and whether Tandem was tested with it."""
    from services.engine.check import Machine
    from services.engine.choice import VLLM_VERSIONS, check_vllm, choose_engine, vllm_version
    from services.engine.config import EngineConfig
    from services.engine.model_config import ModelError

    machine, installed = Machine.this(), vllm_version()
    try:
        config = EngineConfig(choose_model(model)[0], engine=engine)
        choice = choose_engine(config, machine)
        by_itself = choose_engine(replace(config, engine="auto"), machine)
    except (ModelError, SettingsError) as error:
        return [refused("engine", error)]
    would = "" if by_itself.engine == choice.engine else f"; auto would take {by_itself.engine}: {by_itself.why}"
    finding = good("engine", f"{choice.engine}: {choice.why}{would}")
    try:
        check_vllm(installed, machine.device("auto"), choice.why)
    except SettingsError as error:
        if choice.engine == "vllm":
            return [finding, refused("vLLM", error)]
        if installed is None:
            return [finding, good("vLLM", "not installed; --engine vllm needs it: make install-vllm")]
        detail, _, remedy = str(error).rpartition("; ")
        return [finding, worse("vLLM", detail, remedy)]
    return [finding, good("vLLM", f"{installed}, one of {VLLM_VERSIONS}")]
