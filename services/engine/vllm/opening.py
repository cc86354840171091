"""Opens a vLLM engine: checks, loads, lays out, probes. vllm is imported here, when somebody asks for one."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstore.block import BlockLayout, ProofKey
from services.engine.adapters import read_adapters
from services.engine.api import Capabilities
from services.engine.capacity import default_host_bytes
from services.engine.checkpoint import find_model, safetensors_files
from services.engine.config import DTYPE_ALIASES, EngineConfig, with_device_defaults
from services.engine.foreign import model_fingerprint, said_of
from services.engine.model_config import ModelError, UnsupportedModel, said_dtype
from services.engine.refused import MORE_THAN_TEXT
from services.engine.vllm.arguments import make_arguments, prepare_environment
from services.machine import available_memory_bytes
from services.settings import SettingsError, draws_weights, tensor_parallel_size

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

    from services.engine.foreign import Kept, RankCache
    from services.engine.vllm.engine import VllmEngine

GUESSES_FROM_TOKENS: Final = ("ngram", "ngram_gpu", "suffix")  # ways to speculate that keep no KV


def open_vllm(config: EngineConfig, proof_key: ProofKey, progress: Callable[[float], None] | None = None) -> VllmEngine:
    """Load the model and take the memory; `progress` is called with 0..1. Raises `ModelError` or `SettingsError`."""
    tell = progress or (lambda share: None)
    prepare_environment(config.num_threads)
    directory = find_model(config.model, config.revision)
    weights = [] if draws_weights(config.engine_args) else safetensors_files(directory)
    tell(0.0)
    core, config = _open_core(config, directory)
    try:
        return _around(core, config, weights, proof_key, tell)
    except BaseException:
        core.shutdown()
        raise


def _open_core(config: EngineConfig, directory: Path) -> tuple[Any, EngineConfig]:
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    from services.engine.tensor_memory import gpu_of

    is_cpu = current_platform.is_cpu()
    if is_cpu and config.num_threads:
        torch.set_num_threads(config.num_threads)  # of one that was forked, OpenMP has read the environment before
    if config.device not in ("auto", "cpu" if is_cpu else "cuda"):
        raise SettingsError(
            f"--device {config.device}: the vLLM that is installed computes on {'CPUs' if is_cpu else 'GPUs'}", "device"
        )
    config = with_device_defaults(config, gpu_of("cpu" if is_cpu else "cuda:0"))
    dtype = DTYPE_ALIASES.get(config.dtype, config.dtype)
    cache_bytes = config.kv_cache_memory_bytes
    if is_cpu:
        dtype = said_dtype(directory) if dtype == "auto" else dtype
        num_ranks = tensor_parallel_size(config.engine_args)
        cache_bytes = cache_bytes or default_host_bytes(available_memory_bytes()) // num_ranks
    try:
        arguments = make_arguments(config, str(directory), dtype, cache_bytes, is_cpu=is_cpu)
        vllm_config = arguments.create_engine_config()
        if vllm_config.model_config.is_multimodal_model:
            raise UnsupportedModel(f"{config.model}: {MORE_THAN_TEXT}")
        speculation = vllm_config.speculative_config
        if speculation is not None and speculation.method not in GUESSES_FROM_TOKENS:
            raise SettingsError(
                f"speculation by {speculation.method}: a draft model's own KV would not be handed over; there are"
                f" {', '.join(GUESSES_FROM_TOKENS)}",
                "engine_args",
            )
        core = EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=False)
    except (ModelError, SettingsError):
        raise
    except Exception as error:  # whatever its classes for models, its configuration or its kernels raise
        raise ModelError(f"{config.model}: vLLM refuses it: {str(error).strip()[:1000]}") from error
    return core, config


def _around(
    core: Any, config: EngineConfig, weights: Sequence[Path], proof_key: ProofKey, tell: Callable[[float], None]
) -> VllmEngine:
    """Put the adapter around a core that has loaded its model."""
    from services.engine.foreign import NUM_PROBED, Arrivals, num_holders
    from services.engine.tensor_memory import tensor_memory
    from services.engine.vllm.connector import TandemConnector
    from services.engine.vllm.engine import Model, VllmEngine
    from services.engine.vllm.layout import block_layout, read_group

    vllm_config, scheduler = core.vllm_config, core.scheduler
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    if cache_config.block_size != config.block_size:
        raise SettingsError(
            f"{config.block_size}: vLLM keeps this model in blocks of {cache_config.block_size} tokens on this machine;"
            f" give --block-size {cache_config.block_size} to all workers of it",
            "block_size",
        )
    kept = read_group(scheduler.kv_cache_config, cache_config.kv_cache_layout)
    # vLLM switches its cache off where a backend cannot go on from it (MLA on CPUs without AMX).
    shares_blocks = config.enable_prefix_caching and bool(cache_config.enable_prefix_caching)
    num_blocks = cache_config.num_gpu_blocks
    if num_blocks < NUM_PROBED:
        raise SettingsError(f"{num_blocks} KV blocks are too few; give more", "kv_cache_memory_bytes")
    num_heads = 1 if kept.num_vectors == 1 else int(model_config.get_total_num_kv_heads())
    holders = num_holders(vllm_config.parallel_config.tensor_parallel_size, num_heads, kept)
    caches, said_of_cache = _open_ranks(core, kept, num_blocks)
    shares = caches[::holders]  # the ranks that have a head are neighbours
    connector = scheduler.get_kv_connector()
    assert isinstance(connector, TandemConnector)
    tell(0.5)
    settings = model_config.hf_config.to_dict()
    said = said_of(settings, str(model_config.dtype), model_config.max_model_len, config)
    adapters = _load_adapters(core, config)
    fingerprint = model_fingerprint(weights, settings, said, lambda share: tell(0.5 + 0.5 * share))
    layout = block_layout(vllm_config, kept, len(shares), said_of_cache, fingerprint, proof_key.key_id)
    memory = tensor_memory(*shares, is_mapped=len(caches) > 1)
    if memory.block_bytes != layout.block_bytes:
        raise ModelError(f"vLLM's blocks have {memory.block_bytes} bytes, and {layout} would have {layout.block_bytes}")
    return VllmEngine(
        core,
        connector,
        Model(
            vocab_size=model_config.get_vocab_size(),
            eos_token_ids=frozenset(_eos_token_ids(model_config)),
            max_num_waiting=config.max_num_waiting,
            adapters=adapters,
            arrivals=Arrivals(caches, holders),
        ),
        Capabilities(
            max_model_len=model_config.max_model_len,
            max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
            num_blocks=num_blocks - 1,
            num_host_blocks=0,
            caches_prefixes=shares_blocks,
            kv_cache_dtype=layout.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
            is_exact=False,
            samples_first_token=True,
            adapters=tuple(adapters),
            numerics=_numerics(vllm_config, layout, is_batch_invariant=said_of_cache.is_batch_invariant),
            compute={
                "device": memory.device.split(":")[0],
                "kernels": f"vllm/{layout.attention_backend}",
                "quantization": model_config.quantization or "none",
            },
        ),
        layout,
        memory,
        proof_key,
    )


def _open_ranks(core: Any, kept: Kept, num_blocks: int) -> tuple[list[Tensor], RankCache]:
    """Return each rank's cache, as this process has it, and what they say of it. Raises `ModelError`."""
    from services.engine.foreign import gather_ranks

    try:
        answers = core.collective_rpc("tandem_attach", args=(kept, num_blocks))
        return gather_ranks(answers, lambda block_id: core.collective_rpc("tandem_mark", args=(block_id,)))
    except (OSError, RuntimeError) as error:  # what ranks raise comes as a RuntimeError's text
        raise ModelError(f"vLLM's cache is not to be had: {error}") from error


def _load_adapters(core: Any, config: EngineConfig) -> dict[str, LoRARequest]:
    """Have vLLM read each adapter; by key. Raises `SettingsError`."""
    from vllm.lora.request import LoRARequest

    loaded: dict[str, LoRARequest] = {}
    for number, adapter in enumerate(read_adapters(config.lora_modules), 1):
        loaded[adapter.key] = LoRARequest(adapter.name, number, str(adapter.directory))
        try:
            core.add_lora(loaded[adapter.key])
        except Exception as error:  # whatever its loader raises
            raise SettingsError(f"{adapter.name}: vLLM refuses it: {error}", "lora_modules") from error
    return loaded


def _numerics(config: VllmConfig, layout: BlockLayout, *, is_batch_invariant: bool) -> str:
    """Name the arithmetic, as far as that can be: sums depend on the batch besides."""
    model, version = config.model_config, importlib.metadata.version("vllm")
    dtype, quantization = str(model.dtype).removeprefix("torch."), model.quantization or "none"
    ranks = config.parallel_config.tensor_parallel_size
    name = f"vllm-{version}/{dtype}/{quantization}/{layout.attention_backend}/{layout.isa or 'cuda'}/{ranks}-ranks"
    return f"{name}/batch-invariant" if is_batch_invariant else name


def _eos_token_ids(model_config: Any) -> Iterator[int]:
    told = model_config.try_get_generation_config().get("eos_token_id")
    if told is None:
        told = getattr(model_config.hf_text_config, "eos_token_id", None)
    yield from [] if told is None else told if isinstance(told, list) else [told]
