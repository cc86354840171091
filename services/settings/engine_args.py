"""Knows the flags of vLLM's engine, for `--engine vllm`: which go through to it, and which would break the handoff.

Each flag that vLLM 0.31 and 0.32 have is here, and a flag that is not here is refused, since nobody has looked at what
it does to blocks: `make test-vllm` compares the table with the vLLM that is installed. docs/engines.md shows it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from services.settings.declare import SettingsError, closest


class Fate(Enum):
    """What becomes of a flag."""

    PASSED = "passed"
    MEANING = "passed; both sides of a handoff must have the same"
    """It changes the model, or what a block's bytes mean."""
    OURS = "a flag of Tandem's"
    REFUSED = "refused"


@dataclass(frozen=True)
class EngineFlag:
    """One flag of vLLM's, `names[0]`, and its other names.

    `why` is the reason of a refusal. `same` has the values that ask for what is so anyway, and are dropped: "" for a
    switch that is given, "no" for one that is turned off.
    """

    names: tuple[str, ...]
    kind: Literal["switch", "value", "list"]
    fate: Fate
    why: str = ""
    same: tuple[str, ...] = ()

    @property
    def goes_through(self) -> bool:
        return self.fate in (Fate.PASSED, Fate.MEANING)


def _rows(
    fate: Fate, kind: Literal["switch", "value", "list"], flags: str, why: str = "", *same: str
) -> list[EngineFlag]:
    """One row for each word of `flags`, whose names are separated by bars."""
    return [EngineFlag(tuple(word.split("|")), kind, fate, why, same) for word in flags.split()]


def _switches(flags: str) -> list[EngineFlag]:
    return _rows(Fate.PASSED, "switch", flags)


def _values(flags: str) -> list[EngineFlag]:
    return _rows(Fate.PASSED, "value", flags)


def _lists(flags: str) -> list[EngineFlag]:
    return _rows(Fate.PASSED, "list", flags)


def _refused(flags: str, why: str, *same: str) -> list[EngineFlag]:
    return _rows(Fate.REFUSED, "value", flags, why, *same)


def _refused_switches(flags: str, why: str, *same: str) -> list[EngineFlag]:
    return _rows(Fate.REFUSED, "switch", flags, why, *same)


_TEXT = "text only: no images, audio or video"
_STATE = "state that is no KV block is not handed over"
_ALIKE = "start more workers: `--prefill N --decode N`; they are alike, and `--redis` joins them"
_SPREAD = "a block's layers and tokens must lie together on each rank; `--tensor-parallel-size` divides heads"
_MACHINE = "a worker lives on one machine; `--redis` joins those of several"
_ROUTER = "the router has the tokenizer and the templates, and reads what is generated"
_LIMITS = "`--max-num-seqs`, `--max-num-batched-tokens` and `--max-num-waiting` bound what a worker takes on"
_METRICS = "metrics and traces are Tandem's: /metrics, receipts"
_LOGS = "`--log-level` and `--log-format`"
_HUB = "Tandem fetches the model: `--revision`, `HF_TOKEN` and `HF_HOME` in the environment"
_CODE = "no code of a model is ever run"
_CODE_OF_OTHERS = "the handoff is made for vLLM's own classes"
_MOVES = "the pool is registered with the transports once, and may neither move nor go"
_NO_WAY_OUT = "there is no way for it out of the worker"

ENGINE_FLAGS: Final[tuple[EngineFlag, ...]] = (
    # Several GPUs, and mixtures of experts.
    *_values("--tensor-parallel-size|-tp --all2all-backend --expert-placement-strategy --eplb-config"),
    *_values("--distributed-timeout-seconds --cpu-distributed-timeout-seconds --max-parallel-loading-workers"),
    *_switches("--enable-expert-parallel|-ep --enable-ep-weight-filter --enable-eplb --disable-custom-all-reduce"),
    *_switches("--enable-batch-sharded-sampling --enable-hc-sp --enable-shm-tensor-arena --numa-bind"),
    *_lists("--numa-bind-nodes --numa-bind-cpus"),
    *_refused("--distributed-executor-backend", "ranks are processes of the worker", "mp"),
    # Kernels and graphs.
    *_values("--attention-backend --attention-config|-ac"),  # the layout of blocks says which it came to
    *_values("--moe-backend --linear-backend --sparse-indexer-topk-backend --kernel-config --ir-op-priority"),
    *_values("--compilation-config|-cc --optimization-level|-O --performance-mode --max-cudagraph-capture-size --seed"),
    *_lists("--cudagraph-capture-sizes"),
    *_switches("--enforce-eager --enable-flashinfer-autotune --disable-cascade-attn --use-fp64-gumbel"),
    # Quantized weights and caches; the model's own settings.
    *_rows(Fate.MEANING, "value", "--quantization-config --hf-overrides --model-impl --load-format"),
    *_rows(Fate.MEANING, "list", "--kv-cache-dtype-skip-layers"),
    *_rows(Fate.MEANING, "switch", "--disable-sliding-window --allow-deprecated-quantization --language-model-only"),
    *_values("--model-loader-extra-config --safetensors-load-strategy --safetensors-prefetch-num-threads"),
    *_values("--safetensors-prefetch-block-size"),
    *_switches("--use-tqdm-on-load"),
    # Weights in the host's memory.
    *_values("--offload-backend --cpu-offload-gb --offload-group-size --offload-num-in-group --offload-prefetch-step"),
    *_lists("--cpu-offload-params --offload-params"),
    # LoRA and speculation.
    *_switches("--enable-lora --fully-sharded-loras --specialize-active-lora --enable-mixed-moe-lora-format"),
    *_rows(Fate.MEANING, "switch", "--enable-moe-shared-loras"),
    *_values("--max-loras --max-lora-rank --max-cpu-loras"),
    *_rows(Fate.MEANING, "value", "--lora-dtype"),
    *_rows(Fate.MEANING, "list", "--lora-target-modules"),
    *_values("--speculative-config|-sc --spec-method --spec-model --spec-tokens"),
    # Scheduling.
    *_values("--long-prefill-token-threshold --watermark --logprobs-mode"),
    *_switches("--long-prefill-token-threshold-adaptive --scheduler-reserve-full-isl"),
    # What helps to look inside.
    *_switches("--enable-layerwise-nvtx-tracing --enable-logging-iteration-details --jit-monitor-verbose"),
    *_values("--jit-monitor-mode"),
    *_switches("--fail-on-environ-validation"),
    # Flags that are Tandem's, too, with the same meaning.
    *_rows(Fate.OURS, "value", "--model --tokenizer --dtype --revision --max-model-len --quantization|-q --block-size"),
    *_rows(Fate.OURS, "value", "--gpu-memory-utilization|--device-memory-utilization --kv-cache-memory-bytes"),
    *_rows(Fate.OURS, "value", "--num-gpu-blocks-override --kv-offloading-size --max-num-seqs --kv-cache-dtype"),
    *_rows(Fate.OURS, "value", "--max-num-batched-tokens --max-logprobs --generation-config --scheduling-policy"),
    *_rows(Fate.OURS, "value", "--log-level"),
    *_rows(Fate.OURS, "list", "--served-model-name"),
    *_rows(Fate.OURS, "switch", "--enable-prefix-caching --disable-log-stats"),
    # The handoff, and the cache that it fills.
    *_refused("--kv-transfer-config", "blocks travel by Tandem's own connector"),
    *_refused("--kv-events-config", "workers write the prefix index in Redis by themselves"),
    *_refused("--kv-offloading-backend", "store nodes keep blocks beyond a worker's cache"),
    *_refused("--prefix-caching-hash-algo", "always BLAKE2b, 128 bits, the same in every process"),
    *_refused("--prefix-match-unit", "what is found, lent and handed over are whole blocks of `--block-size`"),
    *_refused_switches("--kv-sharing-fast-prefill", "it leaves blocks of a prompt unwritten", "no"),
    *_refused_switches("--swa-bounded-replay", "it leaves blocks of a prompt unwritten", "no"),
    *_refused_switches("--disable-hybrid-kv-cache-manager", "Tandem chooses the manager that it can hand blocks to"),
    *_refused("--scheduler-cls --worker-cls --worker-extension-cls", _CODE_OF_OTHERS),
    *_refused("--additional-config", "nobody knows what it does to blocks"),
    *_refused_switches("--async-scheduling", "a step's blocks are announced when the step is done", "no"),
    *_refused_switches("--enable-chunked-prefill", "blocks travel while the rest of the prompt is computed", ""),
    *_refused("--stream-interval", "tokens are sent as they come", "1"),
    *_refused_switches("--enable-sleep-mode --sleep-mode-offload-cudagraph --enable-cumem-allocator", _MOVES, "no"),
    *_refused_switches("--enable-nccl-comm-suspend", _MOVES, "no"),
    *_refused("--sleep-preserve-parameter-names", _MOVES),
    *_refused("--weight-transfer-config", "new weights would make all blocks wrong: start the worker again"),
    *_refused("--engram-config", _STATE),
    *_refused("--prefix-cache-retention-interval --mamba-backend --mamba-ssu-algorithm --mamba-cache-dtype", _STATE),
    *_refused("--mamba-cache-philox-rounds --mamba-ssm-cache-dtype --mamba-block-size --mamba-cache-mode", _STATE),
    *_refused("--replayssm-buffer-len --gdn-prefill-backend --kda-prefill-backend --kda-decode-backend", _STATE),
    *_refused_switches(
        "--enable-mamba-cache-stochastic-rounding --enable-mamba-shared-prefix-checkpoint", _STATE, "no"
    ),
    *_refused_switches("--use-replayssm", _STATE, "no"),
    # Other ways to have several.
    *_refused("--pipeline-parallel-size|-pp --decode-context-parallel-size|-dcp", _SPREAD, "1"),
    *_refused("--prefill-context-parallel-size|-pcp --dcp-kv-cache-interleave-size", _SPREAD, "1"),
    *_refused("--cp-kv-cache-interleave-size --dcp-comm-backend", _SPREAD),
    *_refused_switches("--dcp-q-replicate", _SPREAD, "no"),
    *_refused("--data-parallel-size|-dp", _ALIKE, "1"),
    *_refused("--data-parallel-rank|-dpn --data-parallel-start-rank|-dpr --data-parallel-size-local|-dpl", _ALIKE),
    *_refused("--data-parallel-address|-dpa --data-parallel-rpc-port|-dpp --data-parallel-backend|-dpb", _ALIKE),
    *_refused_switches("--data-parallel-hybrid-lb|-dph --data-parallel-external-lb|-dpe --enable-elastic-ep", _ALIKE),
    *_refused_switches("--data-parallel-multi-port-external-lb|-dpm --enable-fault-tolerance --enable-dbo", _ALIKE),
    *_refused_switches("--disable-nccl-for-dp-synchronization --aggregate-engine-logging", _ALIKE),
    *_refused(
        "--elastic-ep-max-dp-size --dp-sync-interval --fault-tolerance-config --prefill-schedule-interval", _ALIKE
    ),
    *_refused("--ubatch-size --dbo-decode-token-threshold --dbo-prefill-token-threshold", _ALIKE),
    *_refused("--nnodes|-n --node-rank|-r --master-addr --master-port", _MACHINE),
    *_refused_switches("--ray-workers-use-nsight", _MACHINE, "no"),
    *_refused("--device-ids", "`CUDA_VISIBLE_DEVICES`; `tandem up` gives each worker its own"),
    # Limits that Tandem keeps.
    *_refused(
        "--max-num-active-seqs --max-num-queued-reqs --max-num-queued-tokens --max-num-scheduled-tokens", _LIMITS
    ),
    *_refused("--shutdown-timeout", "`--drain-timeout-s`"),
    # What the router does, and what there is no way for.
    *_refused("--tokenizer-mode", _ROUTER, "auto"),
    *_refused("--renderer-num-workers --reasoning-parser --reasoning-parser-plugin", _ROUTER),
    *_refused("--reasoning-config --override-generation-config --io-processor-plugin", _ROUTER),
    *_refused_switches("--skip-tokenizer-init", _ROUTER),
    *_refused("--runner", "text is generated; there are no embeddings, scores or classes", "auto", "generate"),
    *_refused("--convert", "text is generated; there are no embeddings, scores or classes", "auto", "none"),
    *_refused("--pooler-config --diffusion-config|-dc", "text is generated, token after token"),
    *_refused("--max-lora-cls-labels", "text is generated, token after token"),
    *_refused("--logits-processors", "a request's `logit_bias` and `allowed_token_ids` alone"),
    *_refused("--watermark-config", "a request that goes on elsewhere would lose its marks"),
    *_refused("--structured-outputs-config", "no structured output: requests for it get a 400"),
    *_refused_switches("--enable-prompt-embeds", "a block is known by its tokens, which these have not", "no"),
    *_refused_switches(
        "--enable-return-routed-experts --return-sampling-mask --enable-trace-replay", _NO_WAY_OUT, "no"
    ),
    *_refused("--aux-output-config --profiler-config", _NO_WAY_OUT),
    *_refused("--per-request-spec-decode-metrics", _NO_WAY_OUT, "none"),
    *_refused("--show-hidden-metrics-for-version --otlp-traces-endpoint --collect-detailed-traces", _METRICS),
    *_refused("--kv-cache-metrics-sample --custom-histogram-buckets", _METRICS),
    *_refused_switches("--kv-cache-metrics --cudagraph-metrics --enable-mfu-metrics", _METRICS, "no"),
    *_refused("--logging-config --log-config-file", _LOGS),
    # The model's files, and code that comes with them.
    *_refused("--download-dir --hf-token --hf-config-path --ignore-patterns --tokenizer-revision", _HUB),
    *_refused("--config-format", "config.json is read", "auto", "hf"),
    *_refused("--pt-load-map-location", "pickled weights are never loaded"),
    *_refused("--code-revision --model-class-overrides", _CODE),
    *_refused_switches("--trust-remote-code", _CODE, "no"),
    # Images, audio, video.
    *_refused("--ec-transfer-config --ec-manager-config --allowed-local-media-path --allowed-media-domains", _TEXT),
    *_refused("--limit-mm-per-prompt --media-io-kwargs --mm-processor-kwargs --mm-processor-cache-gb", _TEXT),
    *_refused("--mm-processor-cache-type --mm-hasher-algorithm --mm-shm-cache-max-object-size-mb", _TEXT),
    *_refused("--mm-encoder-tp-mode --mm-encoder-attn-backend --mm-encoder-attn-dtype --mm-tensor-ipc", _TEXT),
    *_refused("--mm-encoder-fp8-scale-path --mm-encoder-fp8-scale-save-path --mm-encoder-fp8-scale-save-margin", _TEXT),
    *_refused("--video-pruning-rate --video-pruning-method --mm-processor-device --mm-ipc-gpu-memory-gb", _TEXT),
    *_refused("--default-mm-loras", _TEXT),
    *_refused_switches("--enable-mm-embeds --mm-encoder-only --interleave-mm-strings --skip-mm-profiling", _TEXT, "no"),
    *_refused_switches(
        "--mm-device-do-normalize --enable-tower-connector-lora --disable-chunked-mm-input", _TEXT, "no"
    ),
)

_BY_NAME: Final = {name: row for row in ENGINE_FLAGS for name in row.names}
_FLAG: Final = re.compile(r"--?[A-Za-z]")
# Read in files that are nobody's but their maker's.
_PICKLED: Final = {"--load-format": ("pt", "npcache")}


def engine_flag(flag: str) -> EngineFlag | None:
    """The row of a flag, in any of its spellings: `-tp`, `--no-enforce-eager`, `--compilation-config.mode`."""
    head = flag.partition(".")[0]
    row = _BY_NAME.get(head) or _BY_NAME.get(head.replace("--no-", "--", 1))
    return row if row is None or head in row.names or row.kind == "switch" else None


@dataclass(frozen=True)
class _Given:
    """A flag as it was given, with its row and its values; `flag` in vLLM's first name for it."""

    flag: str
    row: EngineFlag
    values: tuple[str, ...]

    @property
    def is_off(self) -> bool:
        return self.row.kind == "switch" and self.flag.startswith("--no-")

    @property
    def said(self) -> str:
        """What is compared with `same`."""
        return "no" if self.is_off else " ".join(self.values)


def engine_arguments(text: str) -> list[str]:
    """The flags in `text`, which is as a shell reads it, for vLLM's own parser. Raises SettingsError.

    Those that ask for what is so anyway are left out. Whether a value is right, vLLM says.
    """
    arguments = []
    for given in _passed(text):
        arguments += [given.flag, *given.values]
    return arguments


def block_meaning(text: str) -> tuple[str, ...]:
    """Those of the flags in `text` that must be equal on both sides of a handoff, in one order and one spelling.

    Raises SettingsError.
    """
    chosen = [given for given in _passed(text) if given.row.fate is Fate.MEANING]
    return tuple(sorted(" ".join((given.flag, *given.values)) for given in chosen))


def draws_weights(text: str) -> bool:
    """Whether the flags in `text` have weights drawn by chance, to try a model without them. Raises SettingsError."""
    return "--load-format dummy" in block_meaning(text)


def tensor_parallel_size(text: str) -> int:
    """How many GPUs the flags in `text` ask for. Raises SettingsError."""
    sizes = [given.values[0] for given in _passed(text) if given.flag == "--tensor-parallel-size"] or ["1"]
    if not sizes[-1].isdigit() or not int(sizes[-1]):
        raise _error(f"--tensor-parallel-size must be a number of GPUs, got {sizes[-1]!r}")
    return int(sizes[-1])


def _passed(text: str) -> Iterator[_Given]:
    for given in _read(text):
        row = given.row
        if row.fate is Fate.OURS:
            raise _error(f"{given.flag} is a flag of Tandem's: give it beside --engine-args, not in it")
        if row.fate is Fate.REFUSED:
            if given.said not in row.same:
                raise _error(f"{given.flag} is refused: {row.why.replace('`', '')}")
            continue
        wanted = {"switch": (0, 0), "value": (1, 1), "list": (1, len(given.values))}[row.kind]
        if not wanted[0] <= len(given.values) <= wanted[1]:
            raise _error(f"{given.flag} takes {('no value', 'one value')[wanted[0]]}, not {len(given.values)}")
        if given.values and given.values[0] in _PICKLED.get(given.flag, ()):
            raise _error(f"{given.flag} {given.values[0]} is refused: pickled weights are never loaded")
        yield given


def _read(text: str) -> Iterator[_Given]:
    """Split the text into flags with their values."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _error(f"{text!r} cannot be read as a shell would: {error}") from error
    flag, values = "", list[str]()
    for word in words:
        if not _FLAG.match(word):
            if not flag:
                raise _error(f"{word!r} belongs to no flag")
            values.append(word)
            continue
        if flag:
            yield _given(flag, values)
        flag, equals, value = word.partition("=")
        values = [value] if equals else []
    if flag:
        yield _given(flag, values)


def _given(flag: str, values: Sequence[str]) -> _Given:
    if re.fullmatch(r"-O\d", flag):  # as compilers have it
        flag, values = flag[:2], [flag[2:], *values]
    head, dot, rest = flag.partition(".")
    head = head.replace("_", "-")
    row = engine_flag(head)
    if row is None:
        near = closest(head, _BY_NAME)
        hint = f"; did you mean {near}?" if near else ""
        raise _error(f"{head} is not among the flags of vLLM that Tandem knows{hint}")
    first = row.names[0]
    is_off = head.startswith("--no-") and head not in row.names
    return _Given((first.replace("--", "--no-", 1) if is_off else first) + dot + rest, row, tuple(values))


def _error(message: str) -> SettingsError:
    return SettingsError(message, "engine_args")
