"""Measures what overload does to those who are let in: one stack, the same prompts' lengths, several loads, one table.

    python -m tests.bench.bench_overload                                           # paced workers
    python -m tests.bench.bench_overload --up-args "--prefill 1 --decode 1" --capacity 20 --prompt-tokens 256

The generator is the load test, an open loop: its lateness is in the table. Loads are multiples of `--capacity`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtest.figures import Spread
from loadtest.send import start_stack, stop_stack
from tests.bench.paced import paced_flags


def measure(url: str, rate: float, duration_s: float, options: argparse.Namespace, seed: int, path: Path) -> str:
    """One row: the load test at one rate, in a process of its own. Prompts differ from those of other seeds."""
    command = [
        *(sys.executable, "-m", "loadtest", "run", "--url", url, "--rate", str(rate)),
        *("--duration-s", str(duration_s), "--seed", str(seed), "--json", str(path), "--timeout-s", "120"),
        *("--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads(path.read_text())
    records = [record for record in result["records"] if not record["is_warmup"]]
    refusals = Spread.of(
        record["finished_s"] - record["sent_s"] for record in records if record["outcome"] == "refused"
    )
    lateness = Spread.of(record["sent_s"] - record["scheduled_s"] for record in records)
    summary = result["summary"]
    cells = [
        f"{rate / options.capacity:g}x",
        f"{rate:.1f}",
        f"{summary['request_rate']:.2f}",
        f"{summary['num_refusals']} of {summary['num_requests']}",
        str(summary["num_errors"]),
        _ms(summary["ttft"]["p50"]),
        _ms(summary["ttft"]["p99"]),
        f"{_ms(refusals.p50)} / {_ms(refusals.p99)}",
        f"{_ms(lateness.p50)} / {_ms(lateness.p99)}",
    ]
    if summary["num_errors"]:
        print(summary["first_error"], file=sys.stderr)
    return f"| {' | '.join(cells)} |"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def main() -> int:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--up-args", default="", help="flags of `tandem up` in the place of paced workers")
    parser.add_argument("--capacity", type=float, default=4.8, help="requests a second that the workers can serve")
    parser.add_argument("--loads", default="0.8,1.5,10", help="multiples of it")
    parser.add_argument("--deadline-s", type=float, default=2.0, help="--ttft-deadline-s of the router")
    parser.add_argument("--duration-s", type=float, default=40.0, help="of each load")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        flags = shlex.split(options.up_args) if options.up_args else paced_flags(Path(directory))
        deadline = ("--ttft-deadline-s", str(options.deadline_s))
        stack = start_stack("overload", [*flags, *deadline, "--log-level", "error", "--disable-uvicorn-access-log"])
        try:
            print("| load | offered/s | answered/s | refused | errors | TTFT p50, ms | TTFT p99, ms ", end="")
            print("| a refusal, p50 / p99, ms | generator late, p50 / p99, ms |")
            print("|---|---|---|---|---|---|---|---|---|")
            for seed, load in enumerate(map(float, options.loads.split(",")), os.getpid()):
                path = Path(directory) / "run.json"
                print(measure(stack.url, load * options.capacity, options.duration_s, options, seed, path), flush=True)
        finally:
            stop_stack(stack)
    return 0


if __name__ == "__main__":
    sys.exit(main())
