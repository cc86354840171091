"""Knows the flags of `vllm serve` that Tandem lacks, and says what it does instead.

A flag that asks for what Tandem does anyway is taken, with a note; any other ends the process with its answer, in one
line. docs/from-vllm-or-dynamo.md shows this table, and a test holds them equal. With `--engine vllm`, those of vLLM's
engine go to it instead: `engine_args` says which.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from services.settings.declare import SettingsError
from services.settings.engine_args import ENGINE_FLAGS, Fate, engine_flag


@dataclass(frozen=True)
class VllmFlag:
    """One row. `same`: the values that are taken with a note; "" for a switch without one."""

    flags: tuple[str, ...]
    answer: str
    same: tuple[str, ...] = ()

    @property
    def is_switch(self) -> bool:
        return "" in self.same

    def refusal(self, flag: str) -> str:
        return f"{flag} is vLLM's, not Tandem's: {self._plain}"

    def note(self, flag: str) -> str:
        return f"note: {flag} changes nothing: {self._plain}"

    @property
    def _plain(self) -> str:
        return self.answer.replace("`", "")


def _row(flags: str, answer: str, *same: str) -> VllmFlag:
    return VllmFlag(tuple(flags.split()), answer, same)


_SWITCH = ""

VLLM_FLAGS = (
    # Taken, since nothing changes.
    _row("--enable-chunked-prefill", "prompts are always computed in chunks of `--max-num-batched-tokens`", _SWITCH),
    _row("--enforce-eager", "nothing is captured or compiled", _SWITCH),
    _row("--trust-remote-code", "no code of a model is ever run", _SWITCH),
    _row("--disable-log-requests", "single requests are logged in JSON and at `--log-level debug` only", _SWITCH),
    _row("--enable-prompt-tokens-details", "`usage` always has `cached_tokens`", _SWITCH),
    _row("--enable-request-id-headers", "answers always have `X-Request-Id`", _SWITCH),
    _row("--enable-server-load-tracking", "`GET /load` is always there", _SWITCH),
    _row("--disable-fastapi-docs", "there are none; `/openapi.json` is always there", _SWITCH),
    _row("--disable-custom-all-reduce", "a worker computes on one device", _SWITCH),
    _row("--disable-cascade-attn", "attention has one kernel a device", _SWITCH),
    _row("--disable-frontend-multiprocessing", "a router is one process, unless `--router-workers` says more", _SWITCH),
    _row("--use-v2-block-manager", "there is one block manager", _SWITCH),
    _row("--preemption-mode", "preempted requests are computed again", "recompute"),
    _row("--stream-interval", "tokens are sent as they come", "1"),
    _row("--use-tqdm-on-load", "`tandem up` shows how far loading is", _SWITCH),
    _row("--load-format", "weights are read from safetensors", "auto", "safetensors"),
    _row("--config-format", "config.json is read", "auto", "hf"),
    _row("--tokenizer-mode", "tokenizer.json is read", "auto", "hf"),
    _row("--model-impl", "the model's family is computed by Tandem's own code", "auto"),
    _row("--task --runner", "text is generated; there are no embeddings, scores or classes", "auto", "generate"),
    _row("--chat-template-content-format", "the template decides", "auto"),
    _row("--response-role", "answers are the assistant's", "assistant"),
    # Several devices.
    _row(
        "--tensor-parallel-size -tp --pipeline-parallel-size -pp --decode-context-parallel-size -dcp",
        "a worker computes on one device, and the model must fit it",
        "1",
    ),
    _row(
        "--data-parallel-size -dp",
        "start more workers: `--prefill N --decode N`, or `--colocated --decode N`",
        "1",
    ),
    _row(
        "--data-parallel-size-local --data-parallel-rank --data-parallel-start-rank --data-parallel-address"
        " --data-parallel-rpc-port --data-parallel-backend --data-parallel-hybrid-lb --data-parallel-external-lb",
        "workers are alike; `--redis` joins them",
    ),
    _row("--enable-expert-parallel --enable-eplb", "mixtures of experts are not supported"),
    _row("--distributed-executor-backend", "each worker is one process; `--redis` joins those of several machines"),
    _row(
        "--nnodes --node-rank --master-addr --master-port --headless",
        "workers of all machines find each other by `--redis`",
    ),
    # Disaggregation and the cache.
    _row(
        "--kv-transfer-config",
        "the roles are commands, `tandem prefill` and `tandem decode`; `tandem up` starts both",
    ),
    _row("--kv-events-config", "workers write the prefix index in Redis by themselves"),
    _row("--kv-offloading-backend", "`--kv-offloading-size` alone: blocks go to host memory"),
    _row(
        "--swap-space", "preempted requests are computed again; `--kv-offloading-size` keeps blocks in host memory", "0"
    ),
    _row("--cpu-offload-gb", "weights stay on the device; `tandem size` says whether they fit", "0"),
    _row("--prefix-caching-hash-algo", "always BLAKE2b, 128 bits, the same in every process"),
    _row("--calculate-kv-scales", "KV blocks have the model's dtype, or with int8 a scale for each token and head"),
    # Features.
    _row(
        "--enable-lora --max-loras --max-lora-rank --max-cpu-loras --lora-dtype --fully-sharded-loras",
        "adapters are `--engine vllm`'s; without it serve merged weights",
    ),
    _row(
        "--speculative-config",
        "`--speculative-method ngram` guesses from the text itself, `draft_model` by `--speculative-model`",
    ),
    _row(
        "--enable-auto-tool-choice --tool-call-parser --tool-parser-plugin --tool-server"
        " --exclude-tools-when-tool-choice-none",
        "tools reach the chat template; a call comes back as text",
    ),
    _row("--reasoning-parser --enable-reasoning", "reasoning comes back as part of the text"),
    _row("--guided-decoding-backend --structured-outputs-config", "no structured output: requests for it get a 400"),
    _row(
        "--limit-mm-per-prompt --mm-processor-kwargs --allowed-local-media-path --mm-processor-cache-gb"
        " --disable-mm-preprocessor-cache --mm-encoder-tp-mode --skip-mm-profiling --interleave-mm-strings",
        "text only: no images, audio or video",
    ),
    _row(
        "--convert --pooler-config --override-pooler-config",
        "text is generated; there are no embeddings, scores or classes",
    ),
    _row("--logits-processors --logits-processor-pattern", "a request's `logit_bias` and `allowed_token_ids` alone"),
    _row("--enable-sleep-mode", "no sleep mode: stop the worker, and start it again"),
    # The model's files.
    _row("--hf-overrides --hf-config-path --rope-scaling --rope-theta", "change the model's config.json"),
    _row("--hf-token", "set `HF_TOKEN` in the environment"),
    _row("--download-dir", "set `HF_HOME` in the environment"),
    _row("--tokenizer-revision --code-revision", "`--revision` alone, for all files of the model"),
    _row("--skip-tokenizer-init", "the router needs the tokenizer; prompts may be token ids all the same"),
    _row("--model-loader-extra-config --ignore-patterns --pt-load-map-location", "weights are read from safetensors"),
    _row("--override-generation-config", "`--generation-config` and the requests decide"),
    _row("--disable-sliding-window", "`--max-model-len` within the window has the same effect"),
    # Scheduling and compute.
    _row("--seed", "each request has its own `seed`; one is drawn where it has none"),
    _row(
        "--max-num-partial-prefills --max-long-partial-prefills --long-prefill-token-threshold",
        "chunks of waiting prompts share `--max-num-batched-tokens`",
    ),
    _row(
        "--num-scheduler-steps --async-scheduling --scheduler-cls --scheduler-delay-factor --num-lookahead-slots",
        "there is one scheduler; `--scheduling-policy` is its order",
    ),
    _row(
        "--compilation-config -O --optimization-level --cuda-graph-sizes --max-seq-len-to-capture",
        "nothing is captured or compiled",
    ),
    _row("--attention-backend", "the device decides; on CPUs `--cpu-kernels`"),
    _row("--additional-config --worker-cls --worker-extension-cls", "the engine is not extended by configuration"),
    # The server.
    _row("--enable-log-requests", "`--log-format json`, or `--log-level debug`"),
    _row("--return-tokens-as-token-ids", "a request asks for it: `return_token_ids`"),
    _row("--enable-force-include-usage", "a request asks for it: `stream_options`"),
    _row("--enable-tokenizer-info-endpoint", "`/tokenize` and `/detokenize` alone"),
    _row("--h11-max-incomplete-event-size --h11-max-header-count", "`--max-body-bytes` bounds a request"),
    _row("--show-hidden-metrics-for-version", "no series is hidden"),
    _row("--max-log-len", "no log has a prompt's text"),
    _row("--log-config-file", "`--log-level` and `--log-format`"),
    _row(
        "--allow-credentials --allowed-methods --allowed-headers",
        "`--allowed-origins` alone; all methods and headers are allowed",
    ),
    _row("--enable-ssl-refresh --uds --middleware", "put a proxy in front of the router"),
    _row("--otlp-traces-endpoint --collect-detailed-traces", '`"receipt": true` in a request says where its time went'),
)

_BY_FLAG = {flag: row for row in VLLM_FLAGS for flag in row.flags}


@dataclass(frozen=True)
class Foreign:
    """A flag of vLLM's that somebody gave: its values, none for a switch, and where it stood."""

    flag: str
    values: tuple[str, ...]
    source: str


def _num_values() -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for row in VLLM_FLAGS:
        num_values = 0 if row.is_switch else 1 if row.same else "*"  # of those that are refused, however many
        for flag in row.flags:
            found[flag] = num_values
            if row.is_switch:
                found[flag.replace("--", "--no-", 1)] = 0
    for each in ENGINE_FLAGS:
        for flag in () if each.fate is Fate.OURS else each.names:
            if each.kind == "switch":
                found[flag] = found[flag.replace("--", "--no-", 1)] = 0
            elif each.goes_through:
                found[flag] = 1 if each.kind == "value" else "+"
            else:
                found.setdefault(flag, "*")
    return found


FOREIGN: Final[Mapping[str, str | int]] = _num_values()
"""Each flag, in each spelling that a parser has to know, and how many values it takes, as argparse says it."""


def vllm_flag(flag: str) -> VllmFlag | None:
    """The row of a flag such as `--seed`, of `--no-` and it, or of a dotted one (`--kv-transfer-config.kv_role`)."""
    head = flag.partition(".")[0]
    return _BY_FLAG.get(head) or _BY_FLAG.get(head.replace("--no-", "--", 1))


def is_foreign(flag: str) -> bool:
    """Whether it is vLLM's and not Tandem's, in any spelling."""
    row = engine_flag(flag)
    return vllm_flag(flag) is not None or (row is not None and row.fate is not Fate.OURS)


def goes_through(flag: str) -> bool:
    """Whether `--engine vllm` takes it."""
    row = engine_flag(flag)
    return row is not None and row.goes_through


def refusal(flag: str) -> str:
    """What a process says that does not take it."""
    row, of_engine = vllm_flag(flag), engine_flag(flag)
    where = f" in --engine-args '{flag} …'" if "." in flag else ""
    taken = f"--engine vllm takes it{where}" if goes_through(flag) else ""
    if row is not None:
        return "; ".join(filter(None, (row.refusal(flag), taken)))
    assert of_engine is not None, flag
    return f"{flag} is vLLM's, not Tandem's: {taken or of_engine.why.replace('`', '')}"


def judge(given: Foreign) -> None:
    """Prints a note if this flag changes nothing, else raises the answer to it as a SettingsError."""
    row = vllm_flag(given.flag)
    said = "no" if row is not None and row.is_switch and given.flag.startswith("--no-") else " ".join(given.values)
    if row is None or said not in row.same:
        raise SettingsError(refusal(given.flag).replace(given.flag, given.source, 1))
    print(row.note(given.source), file=sys.stderr)
