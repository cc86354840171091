"""Declares the settings of `tandem up`, `doctor`, `size` and `plan`, which serve nothing themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.engine.kv_cache_dtype import NATIVE_KV_CACHE_DTYPES
from services.peer_settings import PeerSettings
from services.settings import Settings, SettingsError, setting

DEMO_MODEL = Path(__file__).parent / "demo_model" / "tandem-demo"


@dataclass(frozen=True)
class UpConfig(Settings):
    """The stack on one machine. The workers' and the router's own settings are accepted beside these, and passed on."""

    model: str = setting(
        "",
        help="directory of a Hugging Face model, or its name on the hub; the default is the demo model",
        group="stack",
    )
    prefill: int = setting(1, min=0, help="prefill workers; with --elastic, workers that begin as such", group="stack")
    decode: int = setting(1, min=1, help="decode workers; with --elastic, workers that begin as such", group="stack")
    elastic: bool = setting(
        False, help="workers that prefill and decode, and whose roles bend to what comes in", group="stack"
    )
    workers: int = setting(
        0,
        min=0,
        help="elastic workers, of which half begin with prompts, unless --prefill or --decode say how many do; 0: as"
        " these say",
        group="stack",
    )
    colocated: bool = setting(
        False, help="no prefill workers: each decode worker prefills its own prompts", group="stack"
    )
    stores: int = setting(
        0, min=0, help="store nodes: they keep KV blocks beyond the workers' own caches", group="stack"
    )
    redis: str = setting("", help="URL of the registry; the default is a private Redis", group="stack", secret=True)
    pin: bool = setting(True, help="give each worker cores of its own (Linux)", group="stack")
    startup_timeout_s: float = setting(600.0, above=0, help="how long the models may take to load", group="stack")
    log_format: str = setting(
        "auto",
        help="auto and text: a prefix per process; json: one object per line",
        choices=("auto", "text", "json"),
        group="logs",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers and not self.elastic:
            raise SettingsError("counts elastic workers; give --elastic, too, or --prefill and --decode", "workers")
        if self.elastic and self.colocated:
            raise SettingsError("excludes --colocated: choose one of them", "elastic")


@dataclass(frozen=True)
class TokenConfig(PeerSettings):
    """Settings of `tandem token`."""


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Settings of `tandem doctor`."""

    model: str = setting("", help="directory of a Hugging Face model; the default is the demo model")
    engine: str = setting("native", help="as of a worker", choices=("native", "vllm", "auto", "paced"))
    engine_args: str = setting("", help="as of a worker; vLLM's flags may also stand by themselves")
    device: str = setting("auto", help="as of a worker", choices=("auto", "cpu", "cuda"))
    quantization: str = setting("none", help="as of a worker")
    kv_cache_dtype: str = setting("auto", help="as of a worker")
    lora_modules: tuple[str, ...] = setting((), help="as of a worker")
    speculative_method: str = setting("off", help="as of a worker", choices=("off", "ngram", "draft_model"))
    speculative_model: str = setting("", help="as of a worker")
    redis: str = setting("", help="URL of the registry; the default examines the private Redis", secret=True)
    host: str = setting("127.0.0.1", help="address that the router will listen on")
    port: int = setting(8000, min=1, max=65535, help="port that the router will listen on")
    json: bool = setting(False, help="print one JSON object")


@dataclass(frozen=True)
class SizeConfig(Settings):
    """A deployment to be sized: one model, and what is to be done with it."""

    model: str = setting(
        "", help="directory of a Hugging Face model, or its name on the hub; the default is the demo model"
    )
    revision: str = setting("", help="of a model on the hub")
    dtype: str = setting(
        "auto",
        help="of weights and KV; auto: the checkpoint's",
        choices=("auto", "bfloat16", "float16", "half", "float32", "float"),
    )
    kv_cache_dtype: str = setting(
        "auto", help="of KV, as of a worker with the native engine", choices=NATIVE_KV_CACHE_DTYPES
    )
    block_size: int = setting(32, min=1, help="tokens per KV block")
    max_model_len: int = setting(0, min=0, help="tokens of the longest request; 0: the model's context")
    max_num_seqs: int = setting(
        0, min=0, help="requests that one decode worker runs at once; 0: its default on a device with so much memory"
    )
    gpu_memory_bytes: int = setting(80 << 30, min=1, help="memory of one worker's device")
    gpu_memory_utilization: float = setting(0.9, above=0, max=1, help="the part of it that weights and KV may take")
    kv_cache_memory_bytes: int = setting(0, min=0, help="memory for KV blocks; 0: what the weights leave")
    speculative_model: str = setting("", help="draft model of a decode worker, which is then the one that is sized")
    prompt_tokens: int = setting(2048, min=1, help="length of a typical prompt")
    bandwidth_gbit_per_s: float = setting(100.0, above=0, help="between prefill and decode workers")
    num_workers: int = setting(2, min=1, help="workers and store nodes that hold blocks")
    store_dram_bytes: int = setting(64 << 30, min=0, help="memory of the store nodes, all together")
    request_rate: float = setting(1.0, above=0, help="requests per second, for the store's window")
    json: bool = setting(False, help="print one JSON object")


@dataclass(frozen=True)
class PlanConfig(Settings):
    """A trace, what its clients are to get, and the workers that there are."""

    trace: str = setting("", help="requests: Mooncake's JSONL, Azure's CSV, or agent sessions", group="requests")
    scale: float = setting(1.0, above=0, help="times the lengths of prompts and answers", group="requests")
    rate: float = setting(
        0.0, min=0, help="requests per second that the trace is stretched to; 0: its own", group="requests"
    )
    num_requests: int = setting(2000, min=1, help="of the trace, from its beginning, at most", group="requests")
    max_prompt_tokens: int = setting(1 << 20, min=1, help="longer prompts are cut to it", group="requests")
    max_output_tokens: int = setting(1 << 20, min=1, help="longer answers are cut to it", group="requests")
    ttft: float = setting(0.0, min=0, help="milliseconds to the first token, at most", group="objectives")
    tpot: float = setting(0.0, min=0, help="milliseconds for each token behind it, at most", group="objectives")
    good: float = setting(
        90.0, above=0, max=100, help="per cent of the requests that must meet both", group="objectives"
    )
    max_workers: int = setting(64, min=1, help="of the largest fleet to look at", group="objectives")
    profile: str = setting(
        "gpu", help="how fast a worker is: cpu, gpu, or a file, as of --paced-profile", group="workers"
    )
    rates: str = setting(
        "", help="how fast a worker is: the `rates` of its /debug/state, as a JSON file", group="workers"
    )
    block_size: int = setting(32, min=1, help="tokens per KV block", group="workers")
    num_blocks: int = setting(
        8192, min=1, help="KV blocks of a worker, as `tandem size` computes them", group="workers"
    )
    max_num_seqs: int = setting(0, min=0, help="as of a worker; 0: the profile's", group="workers")
    max_num_batched_tokens: int = setting(0, min=0, help="as of a worker; 0: the profile's", group="workers")
    plot: str = setting("", help="HTML file with charts of what each fleet gives", group="output")
    json: bool = setting(False, help="print one JSON object", group="output")
