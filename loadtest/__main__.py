"""`python -m loadtest`: one run, a sweep over rates and targets, or a report of runs made before."""

from __future__ import annotations

# Locust first: it makes the standard library's waits cooperative, and must do so before anything else is imported.
import locust  # noqa: F401  # isort: skip

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from loadtest.conductor import API_KEY_VARIABLE, Job
from loadtest.console import RunProgress, summary_lines
from loadtest.options import OptionError, add_flags, options_from
from loadtest.result import write_result
from loadtest.run import RunFailed, run
from loadtest.summary import summarize


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a run that failed, 2 for flags that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run_command(commands.add_parser("run", help="one run against one URL"))
    flags = parser.parse_args(argv)
    logging.getLogger("locust").setLevel(logging.WARNING)
    try:
        return _run(flags)
    except OptionError as error:
        print(f"loadtest: error: {error}", file=sys.stderr)
        return 2
    except (RunFailed, ValueError) as error:
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


def _run(flags: argparse.Namespace) -> int:
    options = options_from(flags)
    pages = dict(_named(each, "--metrics-url") for each in flags.metrics_url)
    console = Console(stderr=True)
    with RunProgress(console, flags.name) as progress:
        result = run(Job(flags.name, flags.url.rstrip("/"), options, pages), progress.show)
    summary = summarize(result)
    for line in summary_lines(result, summary):
        print(line)
    if flags.json:
        write_result(flags.json, result, summary.to_json())
    return 0 if summary.num_ok and not summary.num_lost else 1


def _named(text: str, flag: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not (name and separator and url):
        raise OptionError(f"{flag} must be NAME=URL, got {text!r}")
    return name, url


if __name__ == "__main__":
    sys.exit(main())
