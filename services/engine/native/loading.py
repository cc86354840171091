"""Loads an engine's models and sizes its memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from services.engine.config import DTYPE_ALIASES, EngineConfig, with_device_defaults
from services.engine.draft_check import check_draft
from services.engine.model_config import ModelError
from services.engine.native.memory import choose_num_blocks, choose_num_host_slots
from services.engine.native.model import LoadedModel, load_model
from services.engine.tensor_memory import gpu_of

# torch's libraries keep what they have prepared for each shape of a product, up to 1024 of both, and every length of a
# prompt's chunk is a shape of its own: a gigabyte in a few hours. Shapes that repeat, those of decoding, are few.
_OPERATOR_CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


@dataclass(frozen=True)
class Loaded:
    """What an engine is made of."""

    model: LoadedModel
    draft: LoadedModel | None  # the model that guesses
    num_blocks: int
    num_host_slots: int


def load(config: EngineConfig, progress: Callable[[float], None] | None) -> Loaded:
    """Load the model, and the one that guesses for it; see how many blocks there is room for.

    Raises `ModelError` or `SettingsError`.
    """
    for name, capacity in _OPERATOR_CACHES.items():
        os.environ.setdefault(name, capacity)
    device = _choose_device(config.device)
    has_draft = config.speculative_method == "draft_model"
    model = load_model(
        config.model,
        dtype=DTYPE_ALIASES.get(config.dtype, config.dtype),
        device=device,
        revision=config.revision or None,
        num_threads=config.num_threads or None,
        max_model_len=config.max_model_len or None,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        cpu_kernels=config.cpu_kernels,
        num_helpers=config.helper_threads,
        progress=progress,
    )
    config = with_device_defaults(config, gpu_of(model.device))
    draft = _load_draft(config, model, device) if has_draft else None
    block_bytes = model.block_layout(config.block_size).block_bytes
    # Each block has room for the keys and values of both models.
    pool_block_bytes = block_bytes + (draft.block_layout(config.block_size).block_bytes if draft is not None else 0)
    num_blocks = choose_num_blocks(config, pool_block_bytes, model.max_model_len, model.device)
    num_host_slots = choose_num_host_slots(config, block_bytes, num_blocks * pool_block_bytes, model.device)
    return Loaded(model, draft, num_blocks, num_host_slots)


def _load_draft(config: EngineConfig, model: LoadedModel, device: str) -> LoadedModel:
    """Load the model that guesses, as the other one is computed. Raises `ModelError`."""
    draft = load_model(
        config.speculative_model,
        dtype=DTYPE_ALIASES.get(config.dtype, config.dtype),
        device=device,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        cpu_kernels=config.cpu_kernels,
    )
    check_draft(draft.directory, draft.config, model.directory, model.config)
    return draft


@contextmanager
def memory_that_runs_out_told(config: EngineConfig) -> Iterator[None]:
    """Say in a line what to do where the memory does not suffice. Raises `ModelError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        why = str(error).strip().splitlines()[:1] or ["not told"]
        raise ModelError(
            f"{config.model}: memory ran out for its weights or its KV pool ({why[0]:.200});"
            " lower --kv-cache-memory-bytes, --gpu-memory-utilization or --max-model-len, or take more memory"
        ) from error


def _choose_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: numpy's, a GPU's, or one of torch on a CPU, which has no class of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
