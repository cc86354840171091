"""Good requests a second on the processors that there are: an elastic fleet beside vLLM and our own fixed splits.

    make bench-goodput
    make bench-goodput BENCH_ARGS="--ttft 1500 --tpot 80 --rounds 3"

A request is good if its first token comes within --ttft and its time per output token is at most --tpot. Where they are
not given they follow from what a lone prompt takes on one core of ours: 1.5 times that, and 0.08 times that or four
lone decode steps, whichever is more. `vllm bench serve` sends random prompts with Poisson arrivals to one server after
the other. Each target's highest rate at which so many in a hundred are good is looked for, over rates 20 % apart; then
all targets take turns at the rates where each did best. A run's prompts are its own, so that no cache knows them, and
the same for all targets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Final

from loadtest.send import start_stack, stop_stack
from loadtest.send.search import RateSearch, place_below, rate_at
from tests.bench.bench_model import write_small_bench_model
from tests.bench.bench_vllm import ENVIRONMENT, NAME, first_token_s, vllm_alone

_ABOVE: Final = 3  # rates tried above the highest that is kept: goodput may rise on for a while
_WARM_UP_PROMPTS: Final = 4
_LONE_RATE: Final = 0.5


@dataclass(frozen=True)
class Served:
    """What came of one run. Times in milliseconds."""

    rate: float
    achieved: float
    ttft: Sequence[float]
    tpot: Sequence[float]
    itl: Sequence[float]
    good_share: float
    good_per_s: float

    @property
    def columns(self) -> tuple[float, ...]:
        """achieved, TTFT p50 and p90, TPOT p50 and p90, ITL p99, good share, good requests a second."""
        ttft, tpot = (_percentiles(values) for values in (self.ttft, self.tpot))
        itl = _percentiles(self.itl)
        return self.achieved, ttft[50], ttft[90], tpot[50], tpot[90], itl[99], self.good_share, self.good_per_s


@dataclass
class Target:
    """A server, and what is known of it so far."""

    name: str
    url: str
    runs: dict[float, Served] = field(default_factory=dict)
    """Those of the search, by rate."""

    @property
    def best_rate(self) -> float:
        return max(self.runs, key=lambda rate: self.runs[rate].good_per_s)


def _percentiles(values: Sequence[float]) -> Sequence[float]:
    """By percent, 0 not among them."""
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [*values] * 99
    return [0.0, *cuts]


def run_once(url: str, tokenizer: Path, rate: float, seed: int, options: argparse.Namespace) -> Served:
    """Have `vllm bench serve` send one run."""
    with tempfile.TemporaryDirectory() as directory:
        command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "openai"]
        command += ["--base-url", url, "--model", NAME, "--tokenizer", str(tokenizer), "--ignore-eos"]
        command += ["--seed", str(seed), "--disable-tqdm", "--dataset-name", "random", "--temperature", "0"]
        command += ["--random-input-len", str(options.input_len), "--random-output-len", str(options.output_len)]
        command += ["--num-prompts", str(options.num_prompts), "--request-rate", str(rate), "--save-result"]
        command += ["--save-detailed", "--result-dir", directory, "--result-filename", "result.json"]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        report = json.loads((Path(directory) / "result.json").read_text())
    return served_of(report, rate, options)


def served_of(report: Mapping[str, object], rate: float, options: argparse.Namespace) -> Served:
    """Read a report of `vllm bench serve --save-detailed`. A request that failed is not good."""
    ttfts, itls, lengths, seconds = (report[name] for name in ("ttfts", "itls", "output_lens", "duration"))
    assert isinstance(ttfts, list)
    assert isinstance(itls, list)
    assert isinstance(lengths, list)
    assert isinstance(seconds, float)
    answered = [place for place, length in enumerate(lengths) if length > 1]
    ttft = [ttfts[place] * 1e3 for place in answered]
    # A chunk may hold several tokens: the time per token is that of the whole answer behind its first.
    tpot = [sum(itls[place]) * 1e3 / (lengths[place] - 1) for place in answered]
    num_good = sum(first <= options.ttft and each <= options.tpot for first, each in zip(ttft, tpot, strict=True))
    gaps = [gap * 1e3 for place in answered for gap in itls[place]]
    return Served(rate, len(answered) / seconds, ttft, tpot, gaps, num_good / len(lengths), num_good / seconds)


def search(target: Target, start: float, run: Callable[[Target, float], Served], good: float) -> None:
    """Find the highest rate at which enough are good, and how the next ones do."""
    looking = RateSearch(start)
    while (rate := looking.next_rate) is not None:
        target.runs[rate] = run(target, rate)
        looking.take(target.runs[rate].good_share >= good)
    above = place_below(looking.found or start) + 1
    for rate in map(rate_at, range(above, above + _ABOVE)):
        if rate not in target.runs:
            target.runs[rate] = run(target, rate)


def compare_lone_prompts(targets: Sequence[Target], options: argparse.Namespace) -> None:
    """Print what a first token takes where nobody else is served, in turns."""
    source, times = random.Random(0), {target.name: list[float]() for target in targets}
    for number in range(options.lone_prompts + 2):
        for target in targets:
            prompt = [source.randrange(100, 30_000) for _ in range(options.input_len)]
            first_s, _ = asyncio.run(first_token_s(target.url, prompt))
            if number >= 2:  # the first ones find nothing warm
                times[target.name].append(first_s * 1e3)
    base = median(times[targets[0].name])
    print(f"A lone prompt of {options.input_len} tokens\n")
    print(f"| target | TTFT p50, ms | of {targets[0].name}'s |\n|---|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {median(taken):.0f} | {median(taken) / base:.2f} |", flush=True)


_COLUMNS: Final = ("rate", "target", "achieved", "TTFT p50/p90 ms", "TPOT p50/p90", "ITL p99", "good", "good/s")
HEAD: Final = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"


def row(rate: float, name: str, columns: Sequence[float]) -> str:
    achieved, ttft, late, tpot, slow, itl, share, per_s = columns
    times = f"{ttft:,.0f} / {late:,.0f} | {tpot:.0f} / {slow:.0f} | {itl:,.0f}"
    return f"| {rate:g} | {name} | {achieved:.2f} | {times} | {share:.0%} | {per_s:.2f} |"


@contextlib.contextmanager
def tandem(name: str, model: Path, flags: Sequence[str]) -> Iterator[Target]:
    """`tandem up` with our own engine, a core for each of two workers."""
    stack = start_stack(name, ["--model", str(model), "--served-model-name", NAME, "--num-threads", "1", *flags])
    try:
        yield Target(name, stack.url)
    finally:
        stop_stack(stack)


@contextlib.contextmanager
def open_targets(model: Path, options: argparse.Namespace) -> Iterator[list[Target]]:
    """All servers, idle ones beside the one that is asked; vLLM first."""
    vllm_flags = ["--dtype", options.vllm_dtype, "--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 30)]
    objectives = [f"--ttft-objective={options.ttft:g}", f"--tpot-objective={options.tpot:g}"]
    ours = [*shlex.split(options.flags), "--max-model-len", "4096"]
    splits = {
        "colocated x2": ["--colocated", "--decode", "2"],
        "1P1D": ["--prefill", "1", "--decode", "1"],
        "elastic x2": ["--workers", "2", "--elastic", *objectives],
    }
    with contextlib.ExitStack() as servers:
        targets = []
        if "vLLM" in options.targets:
            url = servers.enter_context(vllm_alone(model, [*vllm_flags, *shlex.split(options.vllm_flags)], 2))
            targets.append(Target("vLLM", url))
        for name, flags in splits.items():
            if name in options.targets:
                targets.append(servers.enter_context(tandem(name, model, [*ours, *flags])))
        yield targets


def set_objectives(model: Path, seed: int, options: argparse.Namespace) -> None:
    """Fill in those that were not given, by a few lone requests to one worker."""
    if options.ttft and options.tpot:
        return
    alone = argparse.Namespace(**{**vars(options), "num_prompts": options.lone_prompts})
    with tandem("alone", model, [*shlex.split(options.flags), "--colocated", "--decode", "1"]) as target:
        rate = _LONE_RATE
        run_once(
            target.url, model, rate, seed, argparse.Namespace(**{**vars(options), "num_prompts": _WARM_UP_PROMPTS})
        )
        served = run_once(target.url, model, rate, seed + (1 << 20), alone)
    lone, step = median(served.ttft), median(served.itl)
    options.ttft = options.ttft or round(1.5 * lone)
    options.tpot = options.tpot or round(max(0.08 * lone, 4 * step))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face directory; without one a random 0.06 B Qwen2 is made"
    )
    parser.add_argument("--ttft", type=float, default=0.0, help="milliseconds; 0: 1.5 times a lone prompt's")
    parser.add_argument("--tpot", type=float, default=0.0, help="milliseconds; 0: by a lone prompt and decode step")
    parser.add_argument("--good", type=float, default=0.9, help="share of good requests at a rate that is kept")
    parser.add_argument("--start", type=float, default=2.2, help="requests a second that the search begins with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--lone-prompts", type=int, default=15)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--vllm-dtype", default="bfloat16", help="float32 where that is its best")
    parser.add_argument("--vllm-flags", default="", help="further ones of vLLM's")
    parser.add_argument("--flags", default="", help="further ones of tandem up")
    names = ["vLLM", "colocated x2", "1P1D", "elastic x2"]
    parser.add_argument("--targets", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    seeds = iter(range(1, 1 << 20))
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or write_small_bench_model(Path(directory))
        set_objectives(model, next(seeds), options)
        with open_targets(model, options) as targets:
            warm = argparse.Namespace(**{**vars(options), "num_prompts": _WARM_UP_PROMPTS})
            for target in targets:
                run_once(target.url, model, options.start, next(seeds), warm)
            compare_lone_prompts(targets, options)
            print(
                f"\nGood: TTFT <= {options.ttft:g} ms and TPOT <= {options.tpot:g} ms. The search\n\n{HEAD}", flush=True
            )

            def run(target: Target, rate: float) -> Served:
                served = run_once(target.url, model, rate, next(seeds), options)
                print(row(rate, target.name, served.columns), flush=True)
                return served

            for target in targets:
                search(target, options.start, run, options.good)
            compare(targets, model, seeds, options)
    return 0


def compare(targets: Sequence[Target], model: Path, seeds: Iterator[int], options: argparse.Namespace) -> None:
    """Print the medians of some rounds, each target at its best rate, and what the last one gains."""
    taken: dict[str, list[Served]] = {target.name: [] for target in targets}
    for _ in range(options.rounds):
        seed = next(seeds)
        for target in targets:
            taken[target.name].append(run_once(target.url, model, target.best_rate, seed, options))
    medians = {
        target.name: [median(column) for column in zip(*(run.columns for run in taken[target.name]), strict=True)]
        for target in targets
    }
    print(f"\nEach at its best rate, medians of {options.rounds} rounds of {options.num_prompts} requests\n\n{HEAD}")
    for target in targets:
        print(row(target.best_rate, target.name, medians[target.name]))
    *others, last = medians
    for name in others:
        per_s, itl = (medians[last][place] / max(medians[name][place], 1e-9) for place in (7, 5))
        print(f"{last} against {name}: {per_s:.2f} of its good requests a second, {itl:.2f} of its ITL p99")


if __name__ == "__main__":
    sys.exit(main())
