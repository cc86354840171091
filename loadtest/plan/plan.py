"""Plans the whole run before it starts: which request is due when, from the options and the seed alone.

So every process of a distributed run makes the same plan and takes its part of it, and two targets get the same load.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.plan import arrivals
from loadtest.plan.options import LoadOptions, OptionError
from loadtest.plan.prompts import Scale
from loadtest.plan.published import MOONCAKE, Conversations, Percentiles, azure_like
from loadtest.plan.traces import TraceRequest, fresh_blocks, read_trace

_DEFAULT_CONTEXT = 4096
# Lengths of the sessions workload are planned in sixteenths of a token, so that its blocks are 32 tokens.
_FINE = 16
# Classes by prompt length, in the trace's own tokens.
_SHORT, _MEDIUM = 512, 2048


@dataclass(frozen=True)
class PlannedRequest:
    """One request of the plan: due `at_s` seconds after the start."""

    index: int
    at_s: float
    request: TraceRequest
    kind: str
    is_warmup: bool


@dataclass(frozen=True)
class Plan:
    """All requests, in the order of their times, and how their lengths are scaled."""

    requests: tuple[PlannedRequest, ...]
    scale: Scale
    description: str

    @property
    def measured_from_s(self) -> float:
        """When the first request that counts is due."""
        return next((each.at_s for each in self.requests if not each.is_warmup), 0.0)

    @property
    def measured_s(self) -> float:
        """Window of the requests that count, as many gaps as requests: their number over it is the offered rate.

        It begins with the last warm-up request; where there is none, one mean gap is added.
        """
        measured = [each.at_s for each in self.requests if not each.is_warmup]
        warmup = [each.at_s for each in self.requests if each.is_warmup]
        if measured and warmup and measured[-1] > warmup[-1]:
            return measured[-1] - warmup[-1]
        if len(measured) < 2:
            return 1.0
        return (measured[-1] - measured[0]) * len(measured) / (len(measured) - 1)

    @property
    def num_cut(self) -> int:
        """Requests that a limit made shorter than the workload has them."""
        return sum(self.scale.cuts(each.request) for each in self.requests)

    def part(self, index: int, num_parts: int) -> tuple[PlannedRequest, ...]:
        """Returns the share of process `index` of `num_parts`: every num_parts-th request."""
        return self.requests[index::num_parts]


def make_plan(options: LoadOptions, max_model_len: int | None) -> Plan:
    """The plan for a model with this context. Raises OptionError, and ValueError for a trace that cannot be read."""
    scale = _scale(options, max_model_len or _DEFAULT_CONTEXT)
    # Arrivals, workload and ties have generators of their own: changing one leaves the others as they were.
    times_rng, work_rng = random.Random(f"times {options.seed}"), random.Random(f"work {options.seed}")
    number = options.total_requests
    if options.trace:
        requests = read_trace(Path(options.trace), number)
        if len(requests) < number:
            raise OptionError(f"{options.trace} has {len(requests)} requests, the run takes {number}")
    times_s = _times(options, number, times_rng)
    if options.trace:
        if options.arrivals in ("auto", "trace"):
            stamps = arrivals.spread_ties([each.at_s for each in requests], times_rng)
            times_s = arrivals.stretched(stamps, options.rate)
        requests = [replace(each, at_s=at_s) for each, at_s in zip(requests, times_s, strict=True)]
    else:
        requests = _workload(options, times_s, work_rng)
    planned = tuple(
        PlannedRequest(index, each.at_s, each, _kind(each, options), index < options.warmup_requests)
        for index, each in enumerate(requests)
    )
    return Plan(planned, scale, _description(options, scale))


def _times(options: LoadOptions, number: int, rng: random.Random) -> list[float]:
    if options.arrivals == "constant":
        return arrivals.constant(options.rate, number)
    # Warm-up and the rest each have the rate, however few they are.
    num_warmup = min(number, options.warmup_requests)
    warmup = arrivals.gamma(options.rate, options.burstiness, num_warmup, rng)
    rest = arrivals.gamma(options.rate, options.burstiness, number - num_warmup, rng)
    return warmup + [num_warmup / options.rate + at_s for at_s in rest]


def _workload(options: LoadOptions, times_s: Sequence[float], rng: random.Random) -> list[TraceRequest]:
    if options.workload == "azure":
        return azure_like(times_s, rng)
    if options.workload == "mooncake":
        return MOONCAKE.requests(times_s, rng)
    if options.workload == "sessions":
        return _sessions(options).requests(times_s, rng)
    fresh = itertools.count(1)
    lengths = options.prompt_tokens, options.output_tokens
    return [TraceRequest(at_s, *lengths, fresh_blocks(options.prompt_tokens, fresh)) for at_s in times_s]


def _sessions(options: LoadOptions) -> Conversations:
    prompt = Percentiles((options.prompt_tokens * _FINE,) * 12)
    return Conversations(
        first_input=prompt,
        added=prompt,
        output=Percentiles((options.output_tokens * _FINE,) * 12),
        continues=(1 - 1 / options.turns,),
        think_median_s=max(1e-3, options.think_time_s),
        think_sigma=0.5,
        rate=options.rate,
        max_input=1 << 30,
        shares_first_block=False,
    )


def _scale(options: LoadOptions, max_model_len: int) -> Scale:
    factor = options.scale
    if not options.trace and options.workload in ("random", "sessions"):
        if options.scale != 1:
            raise OptionError(f"--scale is for traces and published workloads, not for {options.workload}")
        factor = 1 / _FINE if options.workload == "sessions" else 1.0
    fixed_output = options.output_tokens if not options.trace and options.workload in ("random", "sessions") else 0
    max_output = options.max_output_tokens or fixed_output or max(1, max_model_len // 4)
    max_prompt = options.max_prompt_tokens or max_model_len - max_output
    if max_prompt + max_output > max_model_len or max_prompt < 1:
        raise OptionError(
            f"prompts of {max_prompt} and answers of {max_output} tokens do not fit the model's context of "
            f"{max_model_len}: see --max-prompt-tokens and --max-output-tokens"
        )
    return Scale(factor, max_prompt, max_output)


def _kind(request: TraceRequest, options: LoadOptions) -> str:
    """The class of a request in the figures: by its turn in sessions, else by its prompt's unscaled length."""
    if not options.trace and options.workload == "sessions":
        return "first turn" if request.turn == 0 else "later turn"
    if request.input_length <= _SHORT:
        return f"short (≤ {_SHORT})"
    return f"medium (≤ {_MEDIUM:,})" if request.input_length <= _MEDIUM else f"long (> {_MEDIUM:,})"


def _description(options: LoadOptions, scale: Scale) -> str:
    if options.trace:
        what = f"trace {Path(options.trace).name}"
    elif options.workload == "random":
        what = f"random prompts of {options.prompt_tokens}, answers of {options.output_tokens} tokens"
    elif options.workload == "sessions":
        what = f"sessions of {options.turns:g} turns, {options.prompt_tokens} tokens each"
    else:
        what = f"requests like those of {options.workload.capitalize()}'s conversation trace"
    if options.trace or options.workload in ("azure", "mooncake"):
        what += f", lengths times {scale.factor:g}"
    times = {"gamma": f"Gamma, burstiness {options.burstiness:g}", "constant": "evenly spaced"}
    if options.arrivals in ("auto", "trace") and options.trace:
        return f"{what}; arrivals: the trace's, stretched"
    if options.arrivals == "constant":
        return f"{what}; arrivals: {times['constant']}"
    return f"{what}; arrivals: {'Poisson' if options.burstiness == 1 else times['gamma']}"
