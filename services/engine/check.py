"""Checks a model, and what the settings ask of it, before torch is imported: files, device, memory.

The one place that knows what a model directory must have: `tandem up`, each worker as it starts, `tandem doctor` and
`tandem size` ask here. It refuses only what must fail. Each message says what is wrong, where, and what to do.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from services.engine.capacity import asked_bytes, choose_num_blocks, default_gpu_bytes, default_host_bytes
from services.engine.checkpoint import (
    WITHOUT_WEIGHTS,
    check_tensors,
    find_model,
    num_parameters,
    read_tensors,
    stored_dtype,
)
from services.engine.config import DTYPE_ALIASES, EngineConfig, with_device_defaults
from services.engine.cpu_kernels import AUTOMATIC, NOT_BUILT, REQUIRED_FLAGS, lacking, library_path
from services.engine.draft_check import check_draft
from services.engine.kv_cache_dtype import row_bytes
from services.engine.model_config import DTYPE_BYTES, ModelConfig, UnsupportedModel, read_config
from services.engine.paced import read_profile
from services.machine import Gpu, available_memory_bytes, gpus, processor_flags
from services.settings import SettingsError

_DEFAULT_DTYPE: Final = "bfloat16"  # of a model that is not here, and does not say


@dataclass(frozen=True)
class Machine:
    """What a machine has for its workers. Memory of 0 bytes is not known."""

    available_bytes: int
    gpus: Sequence[Gpu]
    processor_flags: frozenset[str]

    @classmethod
    def this(cls) -> Machine:
        """Return this machine; it has no GPUs where torch is built without CUDA."""
        return cls(available_memory_bytes(), gpus() if torch_has_cuda() else [], processor_flags())

    def device(self, setting: str) -> Literal["cpu", "cuda"]:
        """Return what a worker with that --device computes on. Raises `SettingsError` where there is no such device."""
        if setting == "cuda" and not self.gpus:
            if torch_has_cuda():
                why, remedy = "no NVIDIA device is to be seen", "see `nvidia-smi` and CUDA_VISIBLE_DEVICES"
            else:
                why, remedy = "torch is built for CPUs", "install its CUDA build"
            raise SettingsError(f"--device cuda: {why}; {remedy}, or give --device cpu", "device")
        return "cuda" if setting != "cpu" and self.gpus else "cpu"


def torch_has_cuda() -> bool:
    """Whether the torch that is installed is built for CUDA. It is not imported: that takes a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=]*= *['\"]", version, re.MULTILINE) is not None


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is loaded."""

    directory: Path
    is_whole: bool
    """Whether the weights are here; of a name on the hub only the configuration is looked at."""
    config: ModelConfig
    dtype: str
    num_parameters: int

    def block_bytes(self, block_size: int, kv_cache_dtype: str) -> int:
        """Return the size of one KV block, as `kvstore.block` has it; that imports numpy."""
        rows_per_token = 2 * self.config.num_layers * self.config.num_kv_heads
        return block_size * rows_per_token * row_bytes(self.config.head_dim, self.dtype, kv_cache_dtype)


def look_at_model(model: str, revision: str = "", dtype: str = "auto", *, needs_weights: bool = True) -> Model:
    """Look at a model's files, all of them where it is a directory. Raises `ModelError`."""
    directory = find_model(model, revision, WITHOUT_WEIGHTS)
    config = read_config(directory)
    is_whole = needs_weights and Path(model).expanduser().is_dir()
    tensors = {}
    if is_whole:
        tensors = read_tensors(directory)
        check_tensors(tensors, config, directory)
    own = config.dtype or (stored_dtype(tensors) if tensors else _DEFAULT_DTYPE)
    chosen = own if dtype == "auto" else DTYPE_ALIASES.get(dtype, dtype)
    return Model(directory, is_whole, config, chosen, num_parameters(config))


def check_engine(config: EngineConfig, machine: Machine, num_workers: int = 1) -> Model:
    """Check what the engines of `num_workers` workers on this machine will need. Raises `ModelError`, `SettingsError`.

    They share the machine's memory, or its GPUs in turn. A draft model is counted by each worker that has one, for
    itself.
    """
    is_paced = config.engine == "paced"
    device = "cpu" if is_paced else machine.device(config.device)
    model = look_at_model(config.model, config.revision, config.dtype, needs_weights=not is_paced)
    if is_paced:
        read_profile(config.paced_profile)
        model = replace(model, num_parameters=0)
    longest = model.config.max_context_len
    if config.max_model_len > longest:
        raise SettingsError(
            f"--max-model-len {config.max_model_len} exceeds the context of {longest} tokens of {model.directory}"
            f" (config.json); give {longest} or less",
            "max_model_len",
        )
    if config.quantization == "int8":
        _check_kernels("quantization", config, model, device, machine.processor_flags)
    if config.kv_cache_dtype == "int8" and device != "cpu":
        raise SettingsError(
            "--kv-cache-dtype int8: it is for CPUs, and this is a GPU; give --device cpu, or --engine vllm with one of"
            " vLLM's (fp8)",
            "kv_cache_dtype",
        )
    if config.cpu_kernels in REQUIRED_FLAGS:
        _check_kernels("cpu_kernels", config, model, device, machine.processor_flags)
    draft = None if is_paced else look_at_draft(config, model)
    _check_memory(config, model, draft if num_workers == 1 else None, device, machine, num_workers)
    return model


def look_at_draft(config: EngineConfig, model: Model) -> Model | None:
    """The model that guesses, None where none is to; it must have the tokens of `model`. Raises `ModelError`."""
    if config.speculative_method != "draft_model":
        return None
    draft = look_at_model(config.speculative_model, dtype=config.dtype)
    check_draft(draft.directory, draft.config, model.directory, model.config)
    return draft


def _check_kernels(setting: str, config: EngineConfig, model: Model, device: str, flags: frozenset[str]) -> None:
    """Check that C kernels can do what `setting`, the quantization or the name of kernels, asks of them."""
    variants = AUTOMATIC if config.cpu_kernels == "auto" else (config.cpu_kernels,)
    problem = None
    if device != "cpu":
        problem = "it is for CPUs, and this is a GPU; give --device cpu"
    elif config.cpu_kernels == "torch":
        problem = "it is computed by the C kernels; leave --cpu-kernels torch out"
    elif model.dtype != "bfloat16":
        problem = f"it is for bfloat16, and {model.directory} is {model.dtype}; give --dtype bfloat16"
    elif config.cpu_kernels == "auto" and not lacking("neon", flags):
        problem = "on ARM it needs --cpu-kernels neon; give that"
    elif all(lacking(variant, flags) for variant in variants):
        fewest = min((lacking(variant, flags) for variant in variants), key=len)
        problem = f"this processor lacks {', '.join(fewest)}; take another machine"
    elif not any(library_path(variant) for variant in variants if not lacking(variant, flags)):
        problem = f"the C kernels are not built ({NOT_BUILT}); install one, then `make kernels`"
    if problem is not None:
        flag = f"--{setting.replace('_', '-')}"
        raise SettingsError(f"{flag} {getattr(config, setting)}: {problem}, or leave {flag} out", setting)


def weight_bytes(model: Model, device: str, quantization: str = "none") -> int:
    """Return the memory that the weights take at least, in the type in which they are computed."""
    if quantization == "int8":
        return model.num_parameters
    dtype = "float32" if device == "cpu" and model.dtype == "float16" else model.dtype
    return model.num_parameters * DTYPE_BYTES[dtype]


def _check_memory(
    config: EngineConfig, model: Model, draft: Model | None, device: str, machine: Machine, num_workers: int
) -> None:
    """`draft`: the model that guesses, which has weights, and room in each block."""
    models = [model] if draft is None else [model, draft]
    weights = sum(weight_bytes(each, device, config.quantization) for each in models)
    block_bytes = sum(each.block_bytes(config.block_size, config.kv_cache_dtype) for each in models)
    # One worker takes the first GPU, the launcher gives them out in turn.
    gpu = min(machine.gpus[:num_workers], key=lambda gpu: gpu.free_bytes) if device == "cuda" else None
    num_sharing = -(-num_workers // len(machine.gpus)) if gpu else num_workers
    available = gpu.free_bytes if gpu else machine.available_bytes
    where = f"on GPU {gpu.name}" if gpu else "on this machine"
    whose = "one worker needs" if num_sharing == 1 else f"{num_sharing} workers need"
    if 0 < available < num_sharing * weights:
        remedy = "take a smaller model or more memory"
        raise UnsupportedModel(
            f"{model.directory}: {whose} {as_size(num_sharing * weights)} for weights, and {as_size(available)} are"
            f" available {where}; {remedy if num_sharing == 1 else f'{remedy}, or --colocated, which has one copy'}"
        )
    asked = asked_bytes(config, block_bytes)
    if 0 < available < num_sharing * (weights + asked):
        raise SettingsError(
            f"{'--num-gpu-blocks-override' if config.num_gpu_blocks_override else '--kv-cache-memory-bytes'}: {whose}"
            f" {as_size(num_sharing * asked)} for KV blocks beside {as_size(num_sharing * weights)} for weights, and"
            f" {as_size(available)} are available {where}; give less",
            "kv_cache_memory_bytes",
        )
    if not gpu:
        default = default_host_bytes(available - weights if available else 0)
    elif available:
        default = default_gpu_bytes(available - weights, gpu.total_bytes, weights, config.gpu_memory_utilization)
    else:
        return  # the driver says nothing of the memory: the worker will see
    config = with_device_defaults(config, gpu)
    choose_num_blocks(config, block_bytes, config.max_model_len or model.config.max_context_len, default)


def as_size(size_bytes: int) -> str:
    """The size for people, in MiB below 1 GiB."""
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes < 1 << 30 else f"{size_bytes / 2**30:.1f} GiB"
