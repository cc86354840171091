"""Measures what roles that bend are worth: a mix that shifts from prompts to answers; an elastic fleet, and fixed ones.

    make bench-elastic TRACE="mooncake_conversation.jsonl azure_conv_2023.csv agent_sessions.jsonl"

Four workers over the paced engine, which takes the time of a step and computes nothing, so that two cores do. Of each
trace the first requests have long prompts and short answers, the others the contrary: their lengths are those of the
trace times two factors per half, which are printed. Arrivals are Poisson, open loop, equal for all fleets. A request
is good if it meets both objectives; one that was refused or failed is not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Final

import gevent

from loadtest.figures import Spread
from loadtest.plan import LoadOptions, PlannedRequest, RequestRecord, Scale, TraceRequest, read_trace
from loadtest.send import Client, start_stack, stop_stack

PROFILE: Final = {
    "origin": "a bench",
    "base_s": 0.02, "prompt_token_s": 8e-4, "prompt_pair_s": 1e-8, "running_s": 2e-3, "context_token_s": 1e-7,
    "max_num_seqs": 64, "max_num_batched_tokens": 512,
}  # fmt: skip
"""Four workers of a fleet that two cores can carry: 1,200 prompt tokens a second each, or 15 streams at 50 ms."""
_FLEETS: Final = ("elastic", "1:3", "2:2", "3:1", "colocated x4")
_FLIPS: Final = "tandem:controller_flips_total{"
_LEAD_S: Final = 1.0


@dataclass(frozen=True)
class Half:
    """Requests of one kind: mean lengths."""

    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True)
class Sent:
    """One request of the plan, and who sends it: the halves differ by their factors."""

    planned: PlannedRequest
    client: Client


def factors(requests: Sequence[TraceRequest], half: Half) -> tuple[float, float]:
    """What a trace's prompts and answers are multiplied by, so that their means are those."""
    return (
        half.prompt_tokens / fmean(each.input_length for each in requests),
        half.output_tokens / fmean(each.output_length for each in requests),
    )


def scaled(request: TraceRequest, prompt_factor: float, output_factor: float) -> TraceRequest:
    """The request, such that a `Scale` of the prompts' factor gives both lengths."""
    num_tokens = max(round(request.output_length * output_factor), 1)
    return replace(request, output_length=round(num_tokens / prompt_factor))


def arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Poisson, seconds from the start."""
    draw, times, at_s = random.Random(seed), [], 0.0
    for _ in range(num_requests):
        at_s += draw.expovariate(rate)
        times.append(at_s)
    return times


def plan(url: str, trace: Path, halves: Sequence[Half], options: argparse.Namespace) -> list[Sent]:
    """The requests of a run: as many of each half, in the trace's order."""
    requests = read_trace(trace, options.num_requests)
    times, sent = arrivals(len(requests), options.rate, options.seed), []
    for number, half in enumerate(halves):
        begin, end = (len(requests) * place // len(halves) for place in (number, number + 1))
        prompt_factor, output_factor = factors(requests[begin:end], half)
        scale = Scale(prompt_factor, options.max_prompt_tokens, options.max_output_tokens)
        client = Client(url, "bench", LoadOptions(seed=options.seed + number), scale)
        for place in range(begin, end):
            request = scaled(requests[place], prompt_factor, output_factor)
            sent.append(Sent(PlannedRequest(place, times[place], request, str(number), False), client))
    return sent


def send(requests: Sequence[Sent], start_s: float) -> list[RequestRecord]:
    """Send each at its time, whatever became of the others."""
    start = time.perf_counter() + start_s

    def one(each: Sent) -> RequestRecord:
        body = each.client.body(each.planned)
        gevent.sleep(max(start + each.planned.at_s - time.perf_counter(), 0))
        return each.client.send(each.planned, body, start)

    tasks = [gevent.spawn(one, each) for each in requests]
    gevent.joinall(tasks, raise_error=True)
    return [task.value for task in tasks]


@dataclass(frozen=True)
class Result:
    """What came of one fleet's run, in milliseconds."""

    good_per_s: float
    good_share: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    num_failed: int
    num_flips: int


def result_of(records: Sequence[RequestRecord], options: argparse.Namespace, num_flips: int) -> Result:
    answered = [each for each in records if each.ok]
    good = [
        each
        for each in answered
        if (each.ttft_s or 0) * 1e3 <= options.ttft and (each.tpot_s or 0) * 1e3 <= options.tpot
    ]
    span_s = max(each.scheduled_s for each in records)
    return Result(
        len(good) / span_s,
        len(good) / len(records),
        Spread.of([each.ttft_s * 1e3 for each in answered if each.ttft_s is not None]),
        Spread.of([each.tpot_s * 1e3 for each in answered if each.tpot_s is not None]),
        Spread.of([gap * 1e3 for each in answered for gap in each.gaps_s]),
        len(records) - len(answered),
        num_flips,
    )


def flags_of(fleet: str, options: argparse.Namespace, directory: Path) -> list[str]:
    """Flags of `tandem up`."""
    path = directory / "bench.json"
    path.write_text(json.dumps(PROFILE))
    flags = ["--served-model-name", "bench", "--engine", "paced", "--paced-profile", str(path)]
    flags += ["--num-gpu-blocks-override", "8000"]
    if fleet == "elastic":
        objectives = [f"--ttft-objective={options.ttft:g}", f"--tpot-objective={options.tpot:g}"]
        pace = [f"--controller-window-s={options.window_s:g}", f"--controller-dwell-s={options.dwell_s:g}"]
        return [*flags, "--workers", "4", "--elastic", *objectives, *pace]
    if fleet == "colocated x4":
        return [*flags, "--colocated", "--decode", "4"]
    num_prefill, num_decode = fleet.split(":")
    return [*flags, "--prefill", num_prefill, "--decode", num_decode]


def run(fleet: str, trace: Path, halves: Sequence[Half], options: argparse.Namespace) -> Result:
    """Start the fleet, send the trace, stop it."""
    with tempfile.TemporaryDirectory() as directory:
        stack = start_stack(fleet, flags_of(fleet, options, Path(directory)))
        try:
            records = send(plan(stack.url, trace, halves, options), _LEAD_S)
            with urllib.request.urlopen(f"{stack.url}/metrics") as answer:
                lines = answer.read().decode().splitlines()
        finally:
            stop_stack(stack)
    flips = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(_FLIPS))
    return result_of(records, options, round(flips))


_COLUMNS: Final = (
    "fleet", "good/s", "good", "TTFT p50/p90/p99 ms", "TPOT p50/p90/p99", "ITL p99", "failed", "flips",
)  # fmt: skip
HEAD: Final = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"


def row(fleet: str, result: Result) -> str:
    ttft, tpot = ((each.p50 or 0, each.p90 or 0, each.p99 or 0) for each in (result.ttft, result.tpot))
    times = " | ".join(f"{a:,.0f} / {b:,.0f} / {c:,.0f}" for a, b, c in (ttft, tpot))
    return (
        f"| {fleet} | {result.good_per_s:.2f} | {result.good_share:.0%} | {times} | {result.itl.p99 or 0:,.0f} |"
        f" {result.num_failed} | {result.num_flips} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="+", required=True, help="Mooncake's JSONL, Azure's CSV, sessions")
    parser.add_argument("--num-requests", type=int, default=800, help="half of them with long prompts")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second, on average")
    parser.add_argument("--prompts", type=float, nargs=2, default=[640, 96], help="mean prompt tokens of each half")
    parser.add_argument("--outputs", type=float, nargs=2, default=[16, 128], help="mean output tokens of each half")
    parser.add_argument("--max-prompt-tokens", type=int, default=1500)
    parser.add_argument("--max-output-tokens", type=int, default=500)
    parser.add_argument("--ttft", type=float, default=2000.0, help="milliseconds")
    parser.add_argument("--tpot", type=float, default=60.0, help="milliseconds")
    parser.add_argument("--window-s", type=float, default=10.0, help="the controller's")
    parser.add_argument("--dwell-s", type=float, default=15.0, help="the controller's")
    parser.add_argument("--fleets", nargs="+", default=list(_FLEETS), choices=_FLEETS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    halves = [Half(*means) for means in zip(options.prompts, options.outputs, strict=True)]
    print(f"Good: TTFT <= {options.ttft:g} ms and TPOT <= {options.tpot:g} ms; {options.rate:g} requests/s")
    for trace in options.trace:
        requests = read_trace(trace, options.num_requests)
        middle = len(requests) // 2
        both = [factors(part, half) for part, half in zip((requests[:middle], requests[middle:]), halves, strict=True)]
        words = ", then ".join(f"prompts x {prompts:.3g} and answers x {outputs:.3g}" for prompts, outputs in both)
        print(f"\n{trace.name}, {len(requests)} requests: {words}\n\n{HEAD}", flush=True)
        results = {}
        for fleet in options.fleets:
            results[fleet] = run(fleet, trace, halves, options)
            print(row(fleet, results[fleet]), flush=True)
        others = {name: each.good_per_s for name, each in results.items() if name != "elastic"}
        if "elastic" in results and others:
            best = max(others, key=lambda name: others[name])
            ratio = results["elastic"].good_per_s / max(others[best], 1e-9)
            print(f"\nelastic against {best}, the best of the others: {ratio:.2f} of its good requests a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
