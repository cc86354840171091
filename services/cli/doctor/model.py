"""Checks that the model can be served and that it fits."""

from __future__ import annotations

from pathlib import Path

from services.cli.doctor.findings import Finding, broken, good, worse
from services.cli.up import choose_model
from services.machine import available_memory_bytes
from services.settings import SettingsError

_NUM_COPIES = 2  # a prefill and a decode worker


def check_model(model: str) -> list[Finding]:
    """The model's directory: its configuration, its files, and its size against the memory there is."""
    from services.engine.model_config import ModelError, read_config

    try:
        path, _ = choose_model(model)
    except SettingsError as error:
        return [broken("model", str(error), "give --model a Hugging Face directory")]
    directory = Path(path)
    if not directory.is_dir():
        remedy = f"hf download {model}, then give --model the directory"
        return [worse("model", f"{model} is not here: the workers will fetch it from the hub when they start", remedy)]
    try:
        config = read_config(directory)
    except ModelError as error:
        return [broken("model", f"{directory}: {error}", "see the README for the models that can be served")]
    size_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if size_bytes == 0:
        return [broken("model", f"{directory} has no *.safetensors", "convert the weights to safetensors")]
    missing = [name for name in ("tokenizer.json",) if not (directory / name).is_file()]
    if missing:
        return [
            broken("model", f"{directory} has no {missing[0]}", "save the tokenizer in the fast format, or --tokenizer")
        ]
    findings = [good("model", f"{directory.name}: {_size(size_bytes)} of weights, context {config.max_context_len}")]
    # bfloat16 weights may have to be held in float32.
    needed, available = _NUM_COPIES * size_bytes, available_memory_bytes()
    if available and needed > available:
        detail = f"{_NUM_COPIES} workers hold {_size(needed)} of weights, {_size(available)} are available"
        findings.append(
            worse("model memory", detail, "`tandem up --colocated` needs one copy; or GPUs; or a smaller model")
        )
    return findings


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes < 1 << 30 else f"{size_bytes / 2**30:.1f} GiB"
