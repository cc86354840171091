"""Looks, before anything starts, whether what `tandem up` was asked for can be served here.

The workers look themselves, each for itself; here it is all of them together, and what the router will need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from services.cli.config import UpConfig
from services.cli.up.example import has_chat_template
from services.cli.up.placement import available_gpus, place_workers
from services.cli.up.plan import num_workers, store_directory
from services.engine.checkpoint import WITHOUT_WEIGHTS, find_model
from services.engine.model_config import ModelNotFound, UnsupportedModel
from services.router.config import RouterConfig
from services.settings import Given, tensor_parallel_size
from services.store.config import StoreConfig
from services.worker.config import WorkerConfig


def check_stack(
    config: UpConfig, given: Mapping[str, Given], router: RouterConfig, worker: WorkerConfig, store: StoreConfig
) -> str:
    """Check the model against this machine, for all workers, and what else the processes are told to use.

    Return the engine that `--engine` comes to: the same for all. Raises `ModelError`, `SettingsError`, `KVStoreError`.
    """
    from services.engine.check import Machine
    from services.engine.choice import check_model, vllm_version, with_engine

    machine = Machine.this()
    worker = with_engine(worker, machine, vllm_version())
    gpus = [] if worker.device == "cpu" else available_gpus()
    placement = place_workers(num_workers(config), [], gpus, tensor_parallel_size(worker.engine_args))[0]
    if "gpu_memory_utilization" not in given:
        utilization = placement.gpu_memory_utilization(worker.gpu_memory_utilization)
        worker = replace(worker, gpu_memory_utilization=utilization)
    directory = check_model(worker, machine, num_workers(config))
    if worker.tokenizer:
        directory = find_model(worker.tokenizer, "", WITHOUT_WEIGHTS)
    check_tokenizer(directory)
    if router.chat_template or has_chat_template(directory):
        _check_templates(router.chat_template, directory)
    if config.stores and store.store_disk_dir:
        from kvstore.store import check_directory

        for index in range(config.stores):
            check_directory(store_directory(store, index))
    return worker.engine


def _check_templates(override: str, directory: Path) -> None:
    """Check what the router will render conversations with. Raises `UnsupportedModel`."""
    # Here and not above: most of the router's code for text is read for it.
    from services.router.text import ChatTemplateError, TokenizerError, check_overrides, check_templates

    try:
        check_overrides("", override)
        if not override:
            check_templates(directory)
    except (ChatTemplateError, TokenizerError) as error:
        raise UnsupportedModel(str(error)) from error


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
