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
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from loadtest.figures import cases, judge, read_result, summarize, write_result
from loadtest.plan import AUTO, Job, LoadOptions, OptionError, Origin, RunFailed, add_flags, base_url, options_from
from loadtest.report import RunProgress, SweepProgress, summary_lines, this_commit, this_machine, write_report
from loadtest.run import run
from loadtest.send import (
    API_KEY_VARIABLE,
    PRESETS,
    ModelFailed,
    Sweep,
    SweepFailed,
    Target,
    make_random_model,
    parse_target,
    run_sweep,
)

RANDOM_MODEL, DEMO_MODEL = "random", "demo"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a run that failed, 2 for flags that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run_command(commands.add_parser("run", help="one run against one URL"))
    _add_sweep_command(commands.add_parser("sweep", help="every target at every rate, and a report"))
    _add_report_command(commands.add_parser("report", help="a report of runs made before"))
    flags = parser.parse_args(argv)
    flags.command_line = shlex.join(["python", "-m", "loadtest", *(sys.argv[1:] if argv is None else argv)])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stacks that were started are stopped in either case
    logging.getLogger("locust").setLevel(logging.WARNING)
    command: Callable[[argparse.Namespace], int] = {"run": _run, "sweep": _sweep, "report": _report}[flags.command]
    try:
        return command(flags)
    except OptionError as error:
        print(f"loadtest: error: {error}", file=sys.stderr)
        return 2
    except (RunFailed, SweepFailed, ModelFailed, ValueError) as error:
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
        "Finds how far every target keeps up, compares them, and writes report.html, CSV and JSON files. A target is "
        f"one of {', '.join(PRESETS)} (stacks that `tandem up` starts on this machine, two workers each), NAME=URL for "
        f"a server that runs already, or NAME=FLAGS for a `tandem up` with flags. An API key is read from "
        f"{API_KEY_VARIABLE}."
    )
    parser.add_argument("--target", action="append", metavar="TARGET", help="repeat it; default: both presets")
    parser.add_argument(
        "--rates", default="", help="requests per second, ascending, joined by commas; empty: those are looked for "
        "that each target can keep up with, and all are compared at these",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=0, help="how often each target runs at each rate, taking turns; 0: twice where "
        "rates are looked for, else once",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("build/loadtest"), help="folder for the report")
    parser.add_argument(
        "--up-model", default=RANDOM_MODEL, help="--model of every stack that is started; "
        f"{RANDOM_MODEL}: one of 0.1 B parameters, made below --output and kept there; {DEMO_MODEL}: what `tandem up` "
        "serves by default (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--up-args", default="", help="further flags of `tandem up`, for every stack")
    add_flags(parser.add_argument, leave_out=("rate", "goodput"))
    parser.add_argument(
        "--goodput", default=AUTO, help="as for `run`; "
        f"{AUTO}: time to first token and itl five times what a lone request takes (default: %(default)s)",
    )  # fmt: skip


def _add_report_command(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a report of the JSON files that runs and sweeps have written."
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of runs")
    parser.add_argument("--output", type=Path, default=Path("build/loadtest"), help="folder for the report")


def _run(flags: argparse.Namespace) -> int:
    options = options_from(flags)
    pages = dict(_named(each, "--metrics-url") for each in flags.metrics_url)
    with RunProgress(Console(stderr=True), flags.name) as progress:
        origin = Origin(flags.command_line, this_commit(), this_machine(), options.seed)
        result = run(Job(flags.name, base_url(flags.url), options, pages, origin=origin), progress.show)
    summary = summarize(result)
    for line in summary_lines(result, summary):
        print(line)
    if flags.json:
        write_result(flags.json, result, summary.to_json())
    return 0 if summary.num_ok and not summary.num_lost else 1


def _sweep(flags: argparse.Namespace) -> int:
    flags.rate = 1.0  # each run has its own
    sets_objectives = flags.goodput == AUTO
    if sets_objectives:
        flags.goodput = LoadOptions.goodput  # until the first target has been asked
    targets, rates = tuple(map(parse_target, flags.target or PRESETS)), _rates(flags.rates)
    console = Console(stderr=True)
    sweep = Sweep(
        targets,
        rates,
        options_from(flags),
        (*_model_flags(flags, targets, console), *shlex.split(flags.up_args)),
        flags.output / "runs",
        flags.rounds or (1 if rates else 2),
        sets_objectives,
        Origin(flags.command_line, this_commit(), this_machine(), flags.seed),
    )
    with SweepProgress(console, len(targets) * len(rates) * sweep.rounds or None) as progress:
        try:
            results = run_sweep(sweep, run, os.environ.get(API_KEY_VARIABLE, ""), progress)
        except (SweepFailed, KeyboardInterrupt):
            if progress.results:
                print(f"incomplete: {write_report(flags.output, progress.results)}", file=sys.stderr)
            raise
    print(judge(cases(results)).sentence, file=sys.stderr)
    print(write_report(flags.output, results))
    # A run that looked for a rate may have found one at which nothing is answered in time.
    answered = {each.target for each in results if any(record.ok for record in each.records)}
    return 0 if all(target.name in answered for target in targets) else 1


def _model_flags(flags: argparse.Namespace, targets: Sequence[Target], console: Console) -> list[str]:
    if flags.up_model == DEMO_MODEL or all(target.url for target in targets):
        return []
    if flags.up_model != RANDOM_MODEL:
        return ["--model", flags.up_model]
    folder = flags.output / "model"
    console.print(f"the model: random, 0.1 B parameters, in {folder} (made once, 210 MB)", soft_wrap=True)
    return ["--model", str(make_random_model(folder))]


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
