"""Looks, before anything starts, whether what `tandem up` was asked for can be served here.

The workers look themselves, each for itself; here it is all of them together, and what the router will need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from services.cli.up.placement import available_gpus, place_workers
from services.engine.model_config import ModelNotFound, UnsupportedModel
from services.settings import Given
from services.worker.config import WorkerConfig


def check_stack(num_workers: int, given: Mapping[str, Given], worker: WorkerConfig) -> None:
    """Check the model against this machine, for all workers. Raises `ModelError`, `SettingsError`."""
    from services.engine.check import Machine, check_engine

    placement = place_workers(num_workers, [], available_gpus())[0]
    if placement.gpu_share is not None and "gpu_memory_utilization" not in given:
        worker = replace(worker, gpu_memory_utilization=worker.gpu_memory_utilization * placement.gpu_share)
    model = check_engine(worker, Machine.this(), num_workers)
    if model.is_whole or worker.tokenizer:
        check_tokenizer(Path(worker.tokenizer).expanduser() if worker.tokenizer else model.directory)


def check_tokenizer(directory: Path) -> None:
    """Check that a directory has the tokenizer that the router will load. Raises `ModelError`."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        has_slow = any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt"))
        remedy = "save it so with save_pretrained of transformers" if has_slow else "download it"
        raise ModelNotFound(f"{directory} has no tokenizer.json; {remedy}, or name another directory by --tokenizer")
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON ({error}); download it again") from error
