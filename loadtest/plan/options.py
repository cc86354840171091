"""Declares the settings of one run: a frozen record, and the flags that set it.

The same flags serve `python -m loadtest` and the locustfile, where locust's web UI shows them as fields of its form.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from loadtest.plan.slo import Slo

WORKLOADS = ("random", "azure", "mooncake", "sessions")
ARRIVALS = ("auto", "gamma", "constant", "trace")
ENDPOINTS = ("completions", "chat")
PROMPTS = ("auto", "tokens", "text")


class OptionError(ValueError):
    """A setting that makes no sense; the message names it."""


def _flag(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class LoadOptions:
    """Settings of one run; each field is a flag. Lengths are tokens, times seconds, rates requests per second."""

    model: str = _flag("", "the model's served name; by default the first that /v1/models lists")
    rate: float = _flag(1.0, "requests per second, on average")
    num_requests: int = _flag(0, "requests to measure; 0: as many as come in --duration-s")
    duration_s: float = _flag(60.0, "how long to send, where --num-requests is 0")
    warmup_requests: int = _flag(4, "requests that come first, at the same rate, and are left out of all figures")
    arrivals: str = _flag(
        "auto", "gamma (with --burstiness), constant, or trace: a file's own times, stretched to --rate; auto: trace "
        "where there is --trace, else gamma", choices=ARRIVALS,
    )  # fmt: skip
    burstiness: float = _flag(1.0, "shape of the Gamma distribution of the gaps: 1 is Poisson, below 1 bursts")
    workload: str = _flag("random", "what is asked, where there is no --trace", choices=WORKLOADS)
    trace: str = _flag("", "a trace file: Mooncake's JSONL or Azure's CSV")
    scale: float = _flag(1.0, "factor on the lengths of a trace or a published workload, e.g. 0.0625")
    prompt_tokens: int = _flag(512, "prompt length of the random workload; first turn of the sessions workload")
    output_tokens: int = _flag(64, "answer length of the random and sessions workloads")
    turns: float = _flag(4.0, "turns of a conversation, on average (sessions)")
    think_time_s: float = _flag(5.0, "median time between a user's turns (sessions)")
    max_prompt_tokens: int = _flag(0, "longer prompts are cut; 0: what the model's context leaves")
    max_output_tokens: int = _flag(0, "longer answers are cut; 0: a quarter of the model's context")
    token_ids: str = _flag("100:2000", "prompts are drawn from these token ids, FIRST:END")
    endpoint: str = _flag("completions", "OpenAI endpoint to ask", choices=ENDPOINTS)
    prompts: str = _flag("auto", "send token ids or text; auto: tokens to completions, text to chat", choices=PROMPTS)
    ignore_eos: bool = _flag(True, "ask for answers of exactly the planned length (vLLM's ignore_eos)")
    extra_body: str = _flag("{}", "a JSON object to add to every request's body")
    goodput: str = _flag(
        "ttft:2000,tpot:200", "objectives of a good request, NAME:MILLISECONDS joined by commas; names: ttft, tpot, "
        "itl (99th percentile of a request's own gaps between chunks), itl_max (the longest of them), e2el",
    )  # fmt: skip
    timeout_s: float = _flag(300.0, "a request that takes longer is an error")
    late_ms: float = _flag(50.0, "a request that leaves this much after its time counts as sent late")
    seed: int = _flag(0, "of arrivals, lengths and prompts")

    def __post_init__(self) -> None:
        positive = ("rate", "duration_s", "burstiness", "scale", "prompt_tokens", "output_tokens", "timeout_s")
        for name in positive:
            if not getattr(self, name) > 0:
                raise OptionError(f"{flag_of(name)} must be positive, got {getattr(self, name):g}")
        not_negative = ("num_requests", "warmup_requests", "max_prompt_tokens", "max_output_tokens", "think_time_s")
        for name in (*not_negative, "late_ms"):
            if getattr(self, name) < 0:
                raise OptionError(f"{flag_of(name)} must not be negative, got {getattr(self, name):g}")
        if self.turns < 1:
            raise OptionError(f"--turns must be at least 1, got {self.turns:g}")
        if self.arrivals == "trace" and not self.trace:
            raise OptionError("--arrivals trace needs --trace FILE")
        if self.endpoint == "chat" and self.prompts == "tokens":
            raise OptionError("--prompts tokens: the chat endpoint takes text alone")
        for name, choices in (("arrivals", ARRIVALS), ("workload", WORKLOADS), ("endpoint", ENDPOINTS)):
            if getattr(self, name) not in choices:
                raise OptionError(f"{flag_of(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.prompts not in PROMPTS:
            raise OptionError(f"--prompts must be one of {', '.join(PROMPTS)}, got {self.prompts!r}")
        _ = self.slo, self.token_range, self.extra_fields  # raise where they cannot be read

    @property
    def slo(self) -> Slo:
        try:
            return Slo.parse(self.goodput)
        except ValueError as error:
            raise OptionError(f"--goodput: {error}") from error

    @property
    def token_range(self) -> range:
        first, separator, end = self.token_ids.partition(":")
        if not (separator and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
            raise OptionError(f"--token-ids must be FIRST:END, two numbers in order, got {self.token_ids!r}")
        return range(int(first), int(end))

    @property
    def extra_fields(self) -> dict[str, object]:
        try:
            extra = json.loads(self.extra_body)
        except ValueError as error:
            raise OptionError(f"--extra-body is no JSON: {error}") from error
        if not isinstance(extra, dict):
            raise OptionError(f"--extra-body must be a JSON object, got {self.extra_body!r}")
        return extra

    @property
    def total_requests(self) -> int:
        """Measured and warm-up requests together."""
        return self.warmup_requests + (self.num_requests or max(1, round(self.rate * self.duration_s)))

    @property
    def sends_text(self) -> bool:
        return self.prompts == "text" or (self.prompts == "auto" and self.endpoint == "chat")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(add_argument: Callable[..., object], leave_out: tuple[str, ...] = ()) -> None:
    """Declares every setting as a flag, by the `add_argument` of whichever parser it is."""
    for each in fields(LoadOptions):
        if each.name in leave_out:
            continue
        default = each.default
        more: dict[str, object] = {"choices": each.metadata["choices"]} if "choices" in each.metadata else {}
        more |= {"type": _boolean if isinstance(default, bool) else type(default)}
        shown = each.metadata["help"].replace("%", "%%") + " (default: %(default)s)"
        add_argument(flag_of(each.name), default=default, help=shown, **more)


def options_from(namespace: argparse.Namespace) -> LoadOptions:
    """The settings in parsed flags. Raises OptionError."""
    values: dict[str, Any] = {each.name: getattr(namespace, each.name) for each in fields(LoadOptions)}
    return LoadOptions(**values)


def settings_text(options: LoadOptions) -> str:
    """The flags that make this load, without those at their defaults, and without what differs from run to run."""
    flags = []
    for each in fields(LoadOptions):
        value = getattr(options, each.name)
        if value != each.default and each.name not in ("rate", "seed", "model", "num_requests"):
            flags += [
                flag_of(each.name),
                f"{value:g}"
                if isinstance(value, float)
                else str(value).lower()
                if isinstance(value, bool)
                else str(value),
            ]
    return shlex.join(flags)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
