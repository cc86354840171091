"""Do our load test, `vllm bench serve`, guidellm and aiperf measure the same? One table for each server.

    make agreement

The first server answers on a fixed timetable, so that only the tools can differ: they must agree within 5 %. The
second is Tandem with the demo model; what the tools differ there is also what they and the server take from each
other on the same processors. All tools send the same load, one after the other in every round. Each figure is that of
its best round: what else runs on the machine only ever adds to a latency.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from tests.compat import aiperf_bench, guidellm_bench, loadtest_bench, paced_server, vllm_bench
from tests.compat.__main__ import TOKENIZER, running_target
from tests.compat.load import Figures, Load, Measure, Target
from tests.compat.tool import REPOSITORY

TOLERANCE = 0.05
OURS = "loadtest"
TOOLS: dict[str, Measure] = {
    OURS: loadtest_bench.measure,
    "vllm bench serve": vllm_bench.measure,
    "guidellm": guidellm_bench.measure,
    "aiperf": aiperf_bench.measure,
}
PACED_TTFT_MS, PACED_TPOT_MS = 200, 20
# Many requests: the tools differ by one gap between requests in what they count as the duration.
PACED_LOAD = Load(num_requests=160, rate=8, prompt_tokens=100, output_tokens=32)
LIVE_LOAD = Load(num_requests=60, rate=2, prompt_tokens=100, output_tokens=32)


@contextmanager
def paced_target() -> Iterator[Target]:
    """A server whose every latency is known."""
    command = [sys.executable, "-m", "tests.compat.paced_server"]
    command += ["--ttft-ms", str(PACED_TTFT_MS), "--itl-ms", str(PACED_TPOT_MS)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Target(process.stdout.readline().strip(), paced_server.MODEL, TOKENIZER)
        finally:
            process.terminate()


def measure_in_turns(target: Target, load: Load, num_rounds: int) -> dict[str, list[Figures]]:
    """Every tool once a round, beginning with another one each time, and with other prompts."""
    measured: dict[str, list[Figures]] = {name: [] for name in TOOLS}
    names = list(TOOLS)
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seeded = Load(**vars(load) | {"seed": load.seed + number})
            figures = TOOLS[name](target, seeded)
            figures.check(seeded)
            measured[name].append(figures)
            print(f"round {number + 1}, {name}: {figures}", flush=True)
    return measured


def compare(title: str, measured: dict[str, list[Figures]]) -> tuple[Table, float]:
    """A table with the ratios to our load test, and how far the farthest ratio is from 1."""
    table = Table("tool", "TTFT p50, ms", "ratio", "TPOT p50, ms", "ratio", "output tokens/s", "ratio", title=title)
    ours = _best(measured[OURS])
    farthest = 0.0
    for name, rounds in measured.items():
        cells: list[str] = []
        for value, reference in zip(_best(rounds), ours, strict=True):
            farthest = max(farthest, abs(value / reference - 1))
            cells += [f"{value:.2f}", f"{value / reference:.3f}"]
        table.add_row(name, *cells)
    return table, farthest


def _best(rounds: Sequence[Figures]) -> tuple[float, float, float]:
    return (
        min(figures.ttft_ms for figures in rounds),
        min(figures.tpot_ms for figures in rounds),
        max(figures.output_tokens_per_s for figures in rounds),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compat.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", nargs="+", choices=("paced", "tandem"), default=("paced", "tandem"))
    parser.add_argument("--url", default="", help="a running Tandem with the demo model; default: start one")
    parser.add_argument("--torch-index", default="", help="where torch comes from; default: the package index")
    flags = parser.parse_args()
    for install in (vllm_bench.install, guidellm_bench.TOOL.install, aiperf_bench.TOOL.install):
        install(flags.torch_index)
    console = Console(width=None if sys.stdout.isatty() else 140)
    farthest = 0.0
    if "paced" in flags.servers:
        with paced_target() as target:
            measured = measure_in_turns(target, PACED_LOAD, flags.rounds)
        title = f"A server on a fixed timetable: TTFT {PACED_TTFT_MS} ms, TPOT {PACED_TPOT_MS} ms"
        table, farthest = compare(title, measured)
        console.print(table)
    if "tandem" in flags.servers:
        with running_target(flags.url) as target:
            measured = measure_in_turns(target, LIVE_LOAD, flags.rounds)
        console.print(compare("Tandem, demo model", measured)[0])
    if farthest > TOLERANCE:
        print(f"On the fixed timetable the tools differ by {farthest:.1%}.", file=sys.stderr)
    return int(farthest > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
