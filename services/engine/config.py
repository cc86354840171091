"""Declares an engine's settings: model, memory and scheduling. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.engine.adapters import parse_modules
from services.engine.cpu_kernels import REQUIRED_FLAGS
from services.engine.kv_cache_dtype import NATIVE_KV_CACHE_DTYPES
from services.machine import Gpu
from services.settings import Settings, SettingsError, setting, tensor_parallel_size

DTYPE_ALIASES = {"half": "float16", "float": "float32"}
"""As `vllm serve` spells them."""
NATIVE_QUANTIZATIONS = ("none", "int8")
"""What the native engine computes in; everything else is vLLM's."""


@dataclass(frozen=True)
class EngineConfig(Settings):
    """Names and meanings are those of `vllm serve`; 0 and "" mean: choose a default."""

    model: str = setting("", help="directory of a Hugging Face model, or its name on the hub", group="model")
    revision: str = setting("", help="branch, tag or commit on the hub", group="model")
    dtype: str = setting(
        "auto",
        help="of weights and activations, and of the KV cache but for --kv-cache-dtype; auto takes the model's own",
        choices=("auto", "float32", "float16", "bfloat16", "half", "float"),
        group="model",
    )
    quantization: str = setting(
        "none",
        help="int8 computes the layers' projections in 8 bits (W8A8): half the memory, less exact; on CPUs with the"
        " C kernels only. With --engine vllm one of vLLM's: awq, gptq, fp8 …; a quantized checkpoint needs none",
        group="model",
    )
    cpu_kernels: str = setting(
        "auto",
        help="what computes bfloat16 on a CPU: auto takes the fastest C kernels that the processor can run, else torch;"
        " kernels by name are these or an error",
        choices=("auto", "torch", *REQUIRED_FLAGS),
        group="model",
    )
    engine: str = setting(
        "native",
        help="native: Tandem's own; vllm: vLLM's, for GPUs and for all models that it knows; auto: native for its"
        " models on a CPU, vllm on a GPU and for other models. paced simulates, to try a fleet without its machines:"
        " steps take as long as a profile says, tokens mean nothing, no weights are needed",
        choices=("native", "vllm", "auto", "paced"),
        group="model",
    )
    engine_args: str = setting(
        "",
        help="with --engine vllm: further flags of vLLM's, in one string; most may also stand by themselves"
        " (docs/engines.md)",
        group="model",
    )
    lora_modules: tuple[str, ...] = setting(
        (),
        help="with --engine vllm: LoRA adapters, each as name=path, of a directory with PEFT's files; clients ask for"
        " one as for a model",
        group="model",
    )
    paced_profile: str = setting(
        "gpu", help="with --engine paced: gpu, cpu, or a JSON file of how long steps take", group="model"
    )
    device: str = setting(
        "auto", help="auto takes cuda where there is one, else cpu", choices=("auto", "cpu", "cuda"), group="model"
    )
    num_threads: int = setting(
        0,
        min=0,
        max=1024,
        help="compute threads (CPU), of each rank; 0: as OMP_NUM_THREADS says, else the cores that the process may use,"
        " divided among its ranks",
        group="model",
    )
    helper_threads: int = setting(
        0,
        min=0,
        max=16,
        help="threads at the lowest priority that help with prompts on processors which others leave idle (C kernels,"
        " --num-threads 1)",
        group="model",
    )
    max_model_len: int = setting(
        0, min=0, help="longest prompt plus output, in tokens; 0 takes the model's own", group="model"
    )
    block_size: int = setting(
        32, min=1, help="tokens in a KV block; equal on all workers of a model", choices=(16, 32, 64), group="KV cache"
    )
    kv_cache_dtype: str = setting(
        "auto",
        help="of keys and values: auto takes the model's; int8 keeps them in 8 bits, with a scale for each token and"
        " head: half the memory and handoff of bfloat16, less exact; on CPUs; equal on all workers of a model. With"
        " --engine vllm one of vLLM's: fp8 …",
        group="KV cache",
    )
    num_gpu_blocks_override: int = setting(
        0, min=0, help="KV blocks in the pool, on whatever device; 0: from the memory size", group="KV cache"
    )
    kv_cache_memory_bytes: int = setting(
        0, min=0, help="size of the KV pool, e.g. 4GiB; 0: a share of the memory there is", group="KV cache"
    )
    gpu_memory_utilization: float = setting(
        0.9, above=0, max=1, help="share of the GPU's memory to use (CUDA only)", group="KV cache"
    )
    kv_offloading_size: float = setting(
        0.0,
        min=0,
        help="GiB of main memory for KV blocks that the pool evicts, of each worker; they come back as prefix hits;"
        " 0: none",
        group="KV cache",
    )
    enable_prefix_caching: bool = setting(True, help="reuse the KV blocks of equal prefixes", group="KV cache")
    max_num_seqs: int = setting(
        0,
        min=0,
        help="requests in one step at most; 0: 64 on a CPU, 256 on a GPU, 1024 on a GPU of 70 GiB or more (not A100)",
        group="scheduling",
    )
    max_num_batched_tokens: int = setting(
        0,
        min=0,
        help="token budget of a step; also the longest prefill chunk; 0: 512 on a CPU, 2048 on a GPU, 8192 on a GPU of"
        " 70 GiB or more (not A100), 16384 from 160 GiB on",
        group="scheduling",
    )
    max_num_waiting: int = setting(
        1024, min=1, help="requests that may wait for their first step; more are refused", group="scheduling"
    )
    speculative_method: str = setting(
        "off",
        help="ngram guesses tokens from the text so far, draft_model by a small model, where they are likely to come"
        " true and worth their time; the model confirms them together: the same text in fewer steps. On decode workers;"
        " for vLLM see --speculative-config",
        choices=("off", "ngram", "draft_model"),
        group="speculation",
    )
    speculative_model: str = setting(
        "",
        help="with draft_model: directory or hub name of the model that guesses; its tokens must be the model's own",
        group="speculation",
    )
    num_speculative_tokens: int = setting(
        16,
        min=1,
        max=256,
        help="with --speculative-method: most guesses for a request in one step",
        group="speculation",
    )
    prompt_lookup_min: int = setting(
        2, min=1, help="with ngram: so many tokens at the end must have stood there before", group="speculation"
    )
    prompt_lookup_max: int = setting(
        16,
        min=1,
        help="with ngram: the place is taken that agrees with most tokens, up to so many",
        group="speculation",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise SettingsError("give the directory of a Hugging Face model, or its name on the hub (--model)", "model")
        if self.kv_offloading_size and not self.enable_prefix_caching:
            raise SettingsError("needs prefix caching: what it keeps is found by prefix", "kv_offloading_size")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise SettingsError(f"more than prompt_lookup_max, {self.prompt_lookup_max}", "prompt_lookup_min")
        if self.speculative_method == "draft_model" and not self.speculative_model:
            raise SettingsError("draft_model needs a model that guesses (--speculative-model)", "speculative_method")
        if self.speculative_model and self.speculative_method != "draft_model":
            raise SettingsError("is of use with --speculative-method draft_model alone", "speculative_model")
        tensor_parallel_size(self.engine_args)
        parse_modules(self.lora_modules)
        if self.engine == "vllm":
            self._check_for_vllm()
        elif self.engine != "auto":
            self._check_for_native()

    def _check_for_vllm(self) -> None:
        if not self.enable_prefix_caching:
            raise SettingsError("with vLLM, a prompt that is handed over comes in as a prefix", "enable_prefix_caching")
        if self.kv_offloading_size:
            raise SettingsError("vLLM's blocks have no host tier; store nodes keep them", "kv_offloading_size")
        if self.cpu_kernels != "auto":
            raise SettingsError("vLLM has kernels of its own", "cpu_kernels")
        if self.quantization == "int8":
            raise SettingsError("int8 is the native engine's; give one of vLLM's, or none", "quantization")
        if self.kv_cache_dtype == "int8":
            raise SettingsError(
                "int8 is the native engine's; give one of vLLM's (fp8, int8_per_token_head ...), or auto",
                "kv_cache_dtype",
            )
        if self.speculative_method != "off":
            raise SettingsError("is the native engine's; vLLM's is --speculative-config", "speculative_method")

    def _check_for_native(self) -> None:
        if self.engine_args:
            raise SettingsError("these are vLLM's flags; give --engine vllm", "engine_args")
        if self.lora_modules:
            raise SettingsError("adapters are computed by vLLM; give --engine vllm", "lora_modules")
        if self.quantization not in NATIVE_QUANTIZATIONS:
            known = ", ".join(NATIVE_QUANTIZATIONS)
            raise SettingsError(f"{self.quantization!r} is not one of {known}; --engine vllm has more", "quantization")
        if self.kv_cache_dtype not in NATIVE_KV_CACHE_DTYPES:
            known = ", ".join(NATIVE_KV_CACHE_DTYPES)
            raise SettingsError(
                f"{self.kv_cache_dtype!r} is not one of {known}; --engine vllm has more", "kv_cache_dtype"
            )
        if self.kv_cache_dtype != "auto" and self.engine == "paced":
            raise SettingsError("the simulation keeps words of its own: it has no other than auto", "kv_cache_dtype")


_LARGE_GPU_BYTES = 70 << 30
_HUGE_GPU_BYTES = 160 << 30


def with_device_defaults(config: EngineConfig, gpu: Gpu | None) -> EngineConfig:
    """Fill in what depends on the device, where the settings leave it open; `gpu` None: a CPU.

    On GPUs these are vLLM's for its server (`EngineArgs.get_batch_defaults` in vllm/engine/arg_utils.py, 0.28): chunks
    that keep the arithmetic busy. On a CPU a chunk of 512 tokens does so already, and blocks travel while the next is
    computed.
    """
    if gpu is None:
        num_seqs, num_tokens = 64, 512
    elif gpu.total_bytes >= _HUGE_GPU_BYTES:
        num_seqs, num_tokens = 1024, 16384
    elif gpu.total_bytes >= _LARGE_GPU_BYTES and "a100" not in gpu.model.lower():
        num_seqs, num_tokens = 1024, 8192
    else:
        num_seqs, num_tokens = 256, 2048
    return replace(
        config,
        max_num_seqs=config.max_num_seqs or num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or num_tokens,
    )
