"""Checks that the model can be served and that it fits."""

from __future__ import annotations

from dataclasses import replace

from services.cli.config import DoctorConfig
from services.cli.doctor.engine import engine_settings
from services.cli.doctor.findings import Finding, good, refused, worse
from services.cli.up import check_tokenizer
from services.settings import SettingsError

_NUM_COPIES = 2  # a prefill and a decode worker


def check_model(config: DoctorConfig) -> list[Finding]:
    """The model's directory: its configuration, its files, and its size against the memory there is.

    Of one that vLLM would compute, whether there is all that it and the router read.
    """
    from services.engine.check import Machine, as_size, check_engine, look_at_draft, look_at_model, weight_bytes
    from services.engine.choice import check_for_vllm, choose_engine
    from services.engine.model_config import ModelError

    machine = Machine.this()
    try:
        settings = engine_settings(config)
        if choose_engine(settings, machine).engine == "vllm":
            directory = check_for_vllm(settings)
            check_tokenizer(directory)
            return [good("model", f"{directory.name}: vLLM says more when it loads it")]
        found = look_at_model(settings.model)
    except (ModelError, SettingsError) as error:
        return [refused("model", error)]
    if not found.is_whole:
        remedy = f"hf download {config.model}, then give --model the directory"
        return [
            worse(
                "model", f"{config.model} is not here: the workers will fetch it from the hub when they start", remedy
            )
        ]
    try:
        check_tokenizer(found.directory)
        look_at_draft(settings, found)
    except ModelError as error:
        return [refused("model", error)]
    size = as_size(weight_bytes(found, machine.device(config.device), config.quantization))
    findings = [good("model", f"{found.directory.name}: {size} of weights, context {found.config.max_context_len}")]
    try:
        check_engine(replace(settings, engine="native", engine_args=""), machine, num_workers=_NUM_COPIES)
    except (ModelError, SettingsError) as error:
        if isinstance(error, SettingsError) and error.setting in ("quantization", "kv_cache_dtype"):
            return [refused("model", error)]
        detail, _, remedy = str(error).rpartition("; ")
        findings.append(worse("model memory", detail, remedy))
    return findings
