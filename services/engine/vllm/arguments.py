"""What vLLM is started with: our settings in its words, and its own flags that `services.settings` lets by."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from services.engine.config import EngineConfig
from services.engine.foreign import compile_nothing
from services.settings import SettingsError, engine_arguments

if TYPE_CHECKING:
    from vllm import EngineArgs

# Before vllm is imported. What the user has set stands, but for those that the handoff rests on.
_ENVIRONMENT: Final = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers share a machine
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # until ranks get SIGTERM, which they wait for; they hold nothing
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of ranks: a worker has threads, which a fork would leave half done
}
_NEEDED_ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # it schedules, and a single rank computes, on our thread
    "VLLM_CONFIGURE_LOGGING": "0",  # its records go where ours go, in their format
    "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "0",  # else it tells half of each hash
}


def prepare_environment(num_threads: int = 0) -> None:
    """Set what vLLM reads from the environment; has to precede its import."""
    os.environ.update(_NEEDED_ENVIRONMENT)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    atexit.register(_mute)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)


def _mute() -> None:
    """Libraries of vLLM's list what they leak when the interpreter ends, hundreds of lines: nobody can do anything."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def make_arguments(
    config: EngineConfig, directory: str, dtype: str, kv_cache_bytes: int, *, is_cpu: bool
) -> EngineArgs:
    """Return vLLM's arguments. `kv_cache_bytes` 0: it sizes the cache by `gpu_memory_utilization`.

    Raises `SettingsError`.
    """
    from vllm.config import KVEventsConfig, KVTransferConfig

    arguments = _parsed(config, directory)
    if arguments.enable_lora and not config.lora_modules:
        raise SettingsError("--enable-lora: name the adapters, --lora-modules name=path", "engine_args")
    if config.lora_modules:
        arguments.enable_lora = True
        if is_cpu:  # there it computes a token without an adapter by the last place: that stays empty
            arguments.max_loras = max(arguments.max_loras, len(config.lora_modules) + 1)
        # All stay in memory, as they were read at the start.
        arguments.max_cpu_loras = max(len(config.lora_modules), arguments.max_loras, arguments.max_cpu_loras or 0)
    ours: dict[str, Any] = {
        "dtype": dtype,
        "quantization": None if config.quantization == "none" else config.quantization,
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": config.max_model_len or None,
        # Its first block is nobody's.
        "num_gpu_blocks_override": config.num_gpu_blocks_override + 1 if config.num_gpu_blocks_override else None,
        "kv_cache_memory_bytes": kv_cache_bytes or None,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "disable_hybrid_kv_cache_manager": True,  # of layers with a window all blocks are kept, so that one table holds
        "scheduling_policy": "priority",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "async_scheduling": False,  # a step has to have ended before its blocks are announced
        "distributed_executor_backend": "mp" if arguments.tensor_parallel_size > 1 else None,
        "worker_extension_cls": "services.engine.vllm.ranks.RankExtension",
        "kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        "kv_transfer_config": KVTransferConfig(
            kv_connector="TandemConnector",
            kv_connector_module_path="services.engine.vllm.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
    }
    if hasattr(arguments, "swa_bounded_replay"):  # from 0.32 on; it would leave blocks unwritten
        ours["swa_bounded_replay"] = False
    for name, value in ours.items():
        setattr(arguments, name, value)
    given = {each.partition(".")[0] for each in engine_arguments(config.engine_args)}
    if is_cpu:
        if not given & {"--compilation-config", "--optimization-level", "--no-enforce-eager"}:
            arguments.enforce_eager = True  # compiling takes a minute and a compiler
            compile_nothing()  # of what samples, either
        # Its kernel for CPUs rotates pairs of neighbours (GPT-J's way, DeepSeek's) wrongly; torch does it right.
        custom_ops = arguments.compilation_config.custom_ops
        if not any(each.endswith("rotary_embedding") for each in custom_ops):
            custom_ops.append("-rotary_embedding")
    arguments.use_tqdm_on_load &= "--use-tqdm-on-load" in given  # a bar has no place in a log
    return arguments


def _parsed(config: EngineConfig, directory: str) -> EngineArgs:
    """Read flags as `vllm serve` does, for the model in `directory`. Raises `SettingsError`."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    flags = ["--kv-cache-dtype", config.kv_cache_dtype, *engine_arguments(config.engine_args)]
    try:
        return EngineArgs.from_cli_args(parser.parse_args(["--model", directory, *flags]))
    except (Exception, SystemExit) as error:
        raise SettingsError(f"vLLM refuses {' '.join(flags)!r}: {error}", "engine_args") from error
