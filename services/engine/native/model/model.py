"""Loads a model and runs it; its public names are all that the engine knows of models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kvstore.block import BlockLayout
from services.engine.checkpoint import check_tensors, find_model, stored_dtype
from services.engine.model_config import DTYPES, ModelConfig, ModelError, UnsupportedModel, read_config
from services.engine.native.attention import ForwardBatch
from services.engine.native.kernels import KernelLibrary, choose_kernels
from services.engine.native.memory import allocate_kv_cache
from services.engine.native.model.fingerprint import FingerprintBuilder
from services.engine.native.model.kernel_transformer import KernelTransformer
from services.engine.native.model.linear import compute_dtype
from services.engine.native.model.numerics import numerics_id
from services.engine.native.model.transformer import Transformer
from services.engine.native.model.weights import WeightReader, open_checkpoint
from services.engine.native_layout import native_layout
from services.logs import detail_level

_logger = logging.getLogger(__name__)


class Computation(Protocol):
    """A model's weights and the arithmetic over them: torch's (`Transformer`), or the C kernels'."""

    def use_cache(self, kv_cache: Tensor) -> None:
        """Prepare for the one cache that `forward` will be given. Raises `UnsupportedModel`."""

    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Store the batch's keys and values; return float32 logits `[n, vocab_size]` of the rows asked for."""

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Returns the seconds of all steps so far, by stage; empty where nobody counts."""


@dataclass(frozen=True)
class ComputePath:
    """Names what computes a model here, for logs and metrics."""

    kernels: str  # "amx", "avx512", "avx2"; "torch" where the C kernels are not used
    quantization: str  # "int8" or "none"
    reason: str  # one line for a person
    is_simulation: bool = False  # nothing is computed: tokens mean nothing
    numerics: str = ""  # names the arithmetic
    is_exact: bool = False  # no bit depends on what else is computed, nor on how a sequence is cut into steps


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to run on one device. Used by one thread."""

    directory: Path
    config: ModelConfig
    dtype: str  # of keys and values, but for `kv_cache_dtype`; what is computed in, see `linear.compute_dtype`
    device: str
    fingerprint: str
    max_model_len: int
    computation: Computation
    compute_path: ComputePath
    kv_cache_dtype: str = "auto"  # "auto": `dtype`; "int8": rows in 8 bits

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return what ends an output."""
        return self.config.eos_token_ids

    def block_layout(self, block_size: int) -> BlockLayout:
        """Return what one block of this model's cache is."""
        return native_layout(self.config, self.dtype, self.kv_cache_dtype, block_size, self.fingerprint)

    def new_kv_cache(self, num_blocks: int, block_size: int) -> Tensor:
        """Return zeros `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` of the model's dtype.

        In 8 bits they are bytes, and rows have their scale's at the end (`services.engine.kv_cache_dtype`). Contiguous;
        on CPU aligned to pages. The caller owns it, and zeroes a block again before it is used anew.
        A model runs on one cache: the attention kernel is chosen here, by the cache's block size.
        """
        layout = self.block_layout(block_size)
        shape = (num_blocks, layout.num_layers, 2, layout.num_kv_heads, block_size, layout.head_dim)
        kv_cache = allocate_kv_cache(shape, getattr(torch, layout.dtype), torch.device(self.device))
        self.computation.use_cache(kv_cache)
        return kv_cache

    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Store the batch's keys and values; return float32 logits `[n, vocab_size]` of the rows asked for."""
        return self.computation.forward(batch, kv_cache)

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Returns the seconds of all steps so far, by stage; empty where nobody counts."""
        return self.computation.stage_seconds


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    num_threads: int | None = None,
    max_model_len: int | None = None,
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
    cpu_kernels: str = "auto",
    num_helpers: int = 0,
    progress: Callable[[float], None] | None = None,
) -> LoadedModel:
    """Load `model`, a directory in HuggingFace format or a name on its hub.

    `dtype` "auto" is the checkpoint's own. `max_model_len` defaults to the longest context that the model's positions
    are made for, and cannot exceed it. `num_threads` sets torch's thread count for the process. `quantization` is
    "none" or "int8", `kv_cache_dtype` "auto" or, on a CPU, "int8". `cpu_kernels` "auto" takes the C kernels where they
    can compute the model, "torch" never; "amx" and the like take these or none. `num_helpers` threads help the C
    kernels, of all models of the process, on processors that are idle.
    `progress` is called with 0..1 while weights are read.

    Raises `ModelNotFound`, or `UnsupportedModel` naming what is not supported.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    directory = find_model(model, revision or "")
    config = read_config(directory)
    target = _device(device)
    if kv_cache_dtype != "auto" and target.type != "cpu":
        raise UnsupportedModel(f"kv_cache_dtype {kv_cache_dtype} is for CPUs, and this is {target}; take auto")
    longest = config.max_context_len
    if max_model_len is not None and max_model_len > longest:
        raise UnsupportedModel(
            f"max_model_len {max_model_len} exceeds the context of {longest} tokens of {directory}; give less"
        )
    with open_checkpoint(directory) as checkpoint:
        check_tensors(checkpoint.tensors, config, directory)
        resolved = (config.dtype or stored_dtype(checkpoint.tensors)) if dtype == "auto" else dtype
        if resolved not in DTYPES:
            raise UnsupportedModel(f"dtype {dtype!r} is not supported (only auto, {', '.join(DTYPES)})")
        builder = FingerprintBuilder()
        library, reason = _choose_kernels(resolved, target, cpu_kernels)
        if library is None and cpu_kernels not in ("auto", "torch"):
            raise UnsupportedModel(f"cpu_kernels {cpu_kernels!r} cannot compute it: here computes {reason}")
        computed_in = torch.bfloat16 if library else compute_dtype(getattr(torch, resolved), target)
        if quantization != "none" and (quantization != "int8" or library is None):
            raise UnsupportedModel(
                f"quantization {quantization!r} needs the CPU kernels, int8 only, and here computes {reason};"
                " leave --quantization out"
            )
        reader = WeightReader(checkpoint, builder, computed_in, target, progress)
        computation: Computation
        if library is None:
            computation = Transformer(config, reader)
        else:
            int8 = quantization == "int8"
            computation = KernelTransformer(library, torch.get_num_threads(), config, reader, int8=int8)
            if num_helpers and library.use_helpers(num_helpers) < num_helpers:
                _logger.warning("the system does not let this process have %d helper threads", num_helpers)
    kernels = "torch" if library is None else library.name
    numerics = numerics_id(kernels, resolved, quantization, kv_cache_dtype, target)
    path = ComputePath(kernels, quantization, reason, numerics=numerics, is_exact=library is not None)
    quantized = "" if quantization == "none" else f", {quantization} weights"
    quantized += "" if kv_cache_dtype == "auto" else f", keys and values in {kv_cache_dtype}"
    _logger.log(detail_level(), "computing with %s%s", reason, quantized)
    fingerprint = builder.finish(config, resolved, quantization, kv_cache_dtype)
    longest = max_model_len or longest
    return LoadedModel(
        directory, config, resolved, str(target), fingerprint, longest, computation, path, kv_cache_dtype
    )


def _choose_kernels(dtype: str, device: torch.device, cpu_kernels: str) -> tuple[KernelLibrary | None, str]:
    """Return the C kernels that compute a model, None where torch does, and why."""
    if device.type != "cpu":
        return None, f"torch, on {device}"
    if cpu_kernels == "torch":
        return None, "torch, as cpu_kernels says"
    if dtype != "bfloat16":
        computed = str(compute_dtype(getattr(torch, dtype), device)).removeprefix("torch.")
        return None, f"torch: in {computed}, and the CPU kernels are for bfloat16 (dtype {dtype})"
    choice = choose_kernels(cpu_kernels)
    return choice.library, choice.reason


def _device(name: str) -> torch.device:
    """Return "cpu", "cuda" or "cuda:N" as a device that exists."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown: {error}") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ModelError(f"device {name!r} is not supported (only cpu, cuda, cuda:N)")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices;"
            " compare the driver in `nvidia-smi` with torch's build, or give --device cpu"
        )
    return torch.device("cuda", index)
