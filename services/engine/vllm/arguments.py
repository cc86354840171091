"""What vLLM is started with: our settings in its words, its own flags beside them, and what the handoff rules out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from packaging.version import Version

from services.engine.config import EngineConfig
from services.engine.model_config import UnsupportedModel
from services.settings import SettingsError

OLDEST, BEFORE = Version("0.32"), Version("0.33")

# Before vllm is imported. What the user has set stands, but for those that the handoff rests on.
_ENVIRONMENT: Final = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers share a machine
}
_NEEDED_ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one rank runs on our thread
    "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "0",  # else it tells half of each hash
}

_REFUSED: Final[Mapping[str, str]] = {
    "kv_transfer_config": "blocks are handed over by Tandem's own connector",
    "kv_events_config": "Tandem reads the events in the process",
    "ec_transfer_config": "encoder outputs are not handed over",
    "scheduler_cls": "loans and reservations are made with vLLM's own scheduler",
    "scheduling_policy": "requests are ordered by priority, then arrival",
    "worker_cls": "the probe and resumed requests need vLLM's own worker",
    "worker_extension_cls": "Tandem's own is there",
    "distributed_executor_backend": "one rank runs on the engine's thread",
    "async_scheduling": "a step has to have ended before its blocks are announced",
    "logits_processors": "they would not be told of resumed output",
    "data_parallel_size": "start one worker per replica",
    "pipeline_parallel_size": "blocks of a stage's layers are not handed over yet",
    "tensor_parallel_size": "blocks of several ranks are not handed over yet",
    "decode_context_parallel_size": "a block's tokens would lie on several ranks",
    "prefill_context_parallel_size": "a block's tokens would lie on several ranks",
    "prefix_caching_hash_algo": "the cache is keyed by Tandem's hashes",
    "prefix_match_unit": "the cache is keyed by Tandem's hashes",
    "kv_offloading_size": "vLLM's tier and Tandem's stores would keep the same blocks",
    "cpu_offload_gb": "weights that are fetched in mid-step would stall transfers",
    "enable_sleep_mode": "peers read from the cache at any time",
    "runner": "Tandem serves models that generate",
    "convert": "Tandem serves models that generate",
    "enable_lora": "adapters are not served yet",
    "watermark_config": "its tokens depend on a state that resumed requests lack",
    "skip_tokenizer_init": "routers tokenize",
    "model": "give --model",
    "revision": "give --revision",
    "tokenizer": "give --tokenizer",
    "dtype": "give --dtype",
    "block_size": "give --block-size",
    "max_model_len": "give --max-model-len",
    "max_num_seqs": "give --max-num-seqs",
    "max_num_batched_tokens": "give --max-num-batched-tokens",
    "num_gpu_blocks_override": "give --num-gpu-blocks-override",
    "kv_cache_memory_bytes": "give --kv-cache-memory-bytes",
    "gpu_memory_utilization": "give --gpu-memory-utilization",
    "enable_prefix_caching": "give --enable-prefix-caching",
}


def prepare_environment(config: EngineConfig) -> None:
    """Set what vLLM reads from the environment; has to precede its import. Raises `SettingsError`, by name."""
    installed = None
    for name in ("vllm", "vllm-cpu"):
        try:
            installed = Version(version(name))
            break
        except PackageNotFoundError:
            continue
    if installed is None:
        raise SettingsError("--engine vllm: vLLM is not installed; install tandem[vllm], or give --engine native")
    if not OLDEST <= Version(installed.public) < BEFORE:
        raise SettingsError(
            f"--engine vllm: this version works with vLLM {OLDEST} up to, not including, {BEFORE}, and {installed} is"
            " installed"
        )
    os.environ.update(_NEEDED_ENVIRONMENT)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.num_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.num_threads)


def engine_arguments(
    config: EngineConfig, directory: str, dtype: str, kv_cache_bytes: int, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of `EngineArgs` but for the connector. `own`: vLLM's, as the user gave them.

    `kv_cache_bytes` 0: vLLM sizes the cache by `gpu_memory_utilization`. Raises `SettingsError`, `UnsupportedModel`.
    """
    for name in own:
        if name in _REFUSED:
            raise SettingsError(f"--engine-args: {name} is refused: {_REFUSED[name]}")
    if config.quantization != "none":
        raise SettingsError(
            f"--quantization {config.quantization} is the native engine's; vLLM takes its own by --engine-args",
            "quantization",
        )
    if config.kv_offloading_size:
        raise SettingsError(f"{_REFUSED['kv_offloading_size']}; give 0", "kv_offloading_size")
    arguments: dict[str, Any] = {
        "model": directory,
        "dtype": dtype,
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,  # where the settings say no, keys are such that nobody finds anything
        "scheduling_policy": "priority",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "async_scheduling": False,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "worker_extension_cls": "services.engine.vllm.ranks.RankExtension",
    }
    if config.max_model_len:
        arguments["max_model_len"] = config.max_model_len
    if config.num_gpu_blocks_override:
        arguments["num_gpu_blocks_override"] = config.num_gpu_blocks_override + 1  # its null block is nobody's
    if kv_cache_bytes:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes
    return {**arguments, **own}


def refuse_multimodal(model_config: Any) -> None:
    """Raise `UnsupportedModel` for a model that takes more than text."""
    if model_config.is_multimodal_model:
        raise UnsupportedModel(f"{model_config.model} takes images or sound, whose blocks our hashes do not tell apart")
