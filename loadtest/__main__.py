"""`python -m loadtest`: runs once, sweeps over rates and targets, or reports on earlier runs."""

from __future__ import annotations

# Locust first: it makes the standard library's waits cooperative, and must do so before anything else is imported.
import locust  # noqa: F401  # isort: skip

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from loadtest.figures import read_result, summarize, write_result
from loadtest.plan import Job, OptionError, RunFailed, add_flags, base_url, options_from
from loadtest.report import RunProgress, SweepProgress, summary_lines, this_machine, write_report
from loadtest.run import run
from loadtest.send import API_KEY_VARIABLE, PRESETS, Sweep, SweepFailed, parse_target, run_sweep


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a run that failed, 2 for flags that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run_command(commands.add_parser("run", help="one run against one URL"))
    _add_sweep_command(commands.add_parser("sweep", help="every target at every rate, and a report"))
    _add_report_command(commands.add_parser("report", help="a report of runs made before"))
    flags = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stacks that were started are stopped in either case
    logging.getLogger("locust").setLevel(logging.WARNING)
    command: Callable[[argparse.Namespace], int] = {"run": _run, "sweep": _sweep, "report": _report}[flags.command]
    try:
        return command(flags)
    except OptionError as error:
        print(f"loadtest: error: {error}", file=sys.stderr)
        return 2
    except (RunFailed, SweepFailed, ValueError) as error:
        print(f"loadtest: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loadtest: stopped", file=sys.stderr)
        return 130


def _add_run_command(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sends a planned load to an OpenAI-compatible server, in an open loop, and prints latencies and rates. "
        f"An API key is read from {API_KEY_VARIABLE}."
    )
    parser.add_argument("--url", required=True, help="the server, without /v1: http://127.0.0.1:8000")
    parser.add_argument("--name", default="server", help="what the figures call it")
    parser.add_argument(
        "--metrics-url", action="append", default=[], metavar="NAME=URL", help="a page of gauges to read each second"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every record to this file")
    add_flags(parser.add_argument)


def _add_sweep_command(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs every target at every rate and writes report.html, CSV and JSON files. A target is one of "
        f"{', '.join(PRESETS)} (stacks that `tandem up` starts on this machine, two workers each), NAME=URL for a "
        f"server that runs already, or NAME=FLAGS for a `tandem up` with flags. An API key is read from "
        f"{API_KEY_VARIABLE}."
    )
    parser.add_argument("--target", action="append", metavar="TARGET", help="repeat it; default: both presets")
    parser.add_argument("--rates", default="1,2,4", help="requests per second, ascending, joined by commas")
    parser.add_argument("--output", type=Path, default=Path("build/loadtest"), help="folder for the report")
    parser.add_argument("--up-model", default="", help="--model of every stack that is started; empty: the demo model")
    parser.add_argument("--up-args", default="", help="further flags of `tandem up`, for every stack")
    add_flags(parser.add_argument, leave_out=("rate",))


def _add_report_command(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a report of the JSON files that runs and sweeps have written."
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of runs")
    parser.add_argument("--output", type=Path, default=Path("build/loadtest"), help="folder for the report")


def _run(flags: argparse.Namespace) -> int:
    options = options_from(flags)
    pages = dict(_named(each, "--metrics-url") for each in flags.metrics_url)
    with RunProgress(Console(stderr=True), flags.name) as progress:
        result = run(Job(flags.name, base_url(flags.url), options, pages), progress.show)
    summary = summarize(result)
    for line in summary_lines(result, summary):
        print(line)
    if flags.json:
        write_result(flags.json, result, summary.to_json())
    return 0 if summary.num_ok and not summary.num_lost else 1


def _sweep(flags: argparse.Namespace) -> int:
    flags.rate = 1.0  # each run has its own
    targets = tuple(map(parse_target, flags.target or PRESETS))
    stack_flags = ["--model", flags.up_model] if flags.up_model else []
    stack_flags += shlex.split(flags.up_args)
    sweep = Sweep(targets, _rates(flags.rates), options_from(flags), tuple(stack_flags), flags.output / "runs")
    api_key = os.environ.get(API_KEY_VARIABLE, "")
    # Taken before our own load: a reader must know whether the machine had other things to do.
    machine = f"{this_machine()}, load average {os.getloadavg()[0]:.1f} before the sweep"
    with SweepProgress(Console(stderr=True), len(targets) * len(sweep.rates)) as progress:
        try:
            results = run_sweep(sweep, run, api_key, progress)
        except SweepFailed:
            if progress.results:
                print(f"incomplete: {write_report(flags.output, progress.results, machine)}", file=sys.stderr)
            raise
    print(write_report(flags.output, results, machine))
    return 0 if all(summarize(each).num_ok for each in results) else 1


def _report(flags: argparse.Namespace) -> int:
    print(write_report(flags.output, [read_result(path) for path in flags.results]))
    return 0


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.replace(",", " ").split())
    except ValueError as error:
        raise OptionError(f"--rates must be numbers joined by commas, got {text!r}") from error


def _named(text: str, flag: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not (name and separator and url):
        raise OptionError(f"{flag} must be NAME=URL, got {text!r}")
    return name, url


if __name__ == "__main__":
    sys.exit(main())
