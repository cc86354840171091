"""Serves locust's own command: its web UI, and its distributed mode.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000      # open http://localhost:8089, set the rate, start
    locust -f loadtest/locustfile.py --host URL --headless --rate 4 --num-requests 200 --result run.json
    locust -f loadtest/locustfile.py --master --expect-workers 2 --headless --host URL --rate 40 --result run.json
    locust -f loadtest/locustfile.py --worker                                      # on each machine that sends

Each worker sends every n-th request of one plan; the master merges their records. A trace file must be there, under the
same path, on each machine. `python -m loadtest report run.json` makes the page.
"""

from __future__ import annotations

import logging
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

from locust import events, runners
from locust.env import Environment

from loadtest.conductor import Conductor
from loadtest.figures import RunResult, summarize, write_result
from loadtest.plan import Job, Origin, add_flags, base_url, options_from
from loadtest.report import summary_lines, this_commit, this_machine
from loadtest.users import OpenLoopUser, PlannedShape, attach

__all__ = ["OpenLoopUser", "PlannedShape"]

log = logging.getLogger(__name__)

# Heartbeats, one a second, that the master misses before it gives a worker up. Locust's 3 are few where a worker shares
# its cores with the server that it overloads.
runners.HEARTBEAT_LIVENESS = 10


@events.init_command_line_parser.add_listener
def _add_flags(parser: ArgumentParser) -> None:
    add_flags(parser.add_argument)
    parser.add_argument("--target-name", default="server", help="what the report calls the target")
    parser.add_argument("--metrics-url", default="", help="pages of gauges to read: NAME=URL, joined by commas")
    parser.add_argument("--result", default="", help="write records and figures to this JSON file")


@events.init.add_listener
def _set_up(environment: Environment, **_: object) -> None:
    def job() -> Job:
        flags = environment.parsed_options
        assert flags is not None
        if not environment.host:
            raise ValueError("no target: set --host, or the host in the form")
        pages = dict(each.split("=", 1) for each in filter(None, flags.metrics_url.split(",")))
        options = options_from(flags)
        origin = Origin(shlex.join(sys.argv), this_commit(), this_machine(), options.seed)
        return Job(flags.target_name, base_url(environment.host), options, pages, origin=origin)

    def failed(reason: str) -> None:
        log.error("the run cannot start: %s", reason)
        environment.process_exit_code = 1

    def finished(result: RunResult) -> None:
        flags = environment.parsed_options
        assert flags is not None
        summary = summarize(result)
        for line in summary_lines(result, summary):
            log.info(line)
        if flags.result:
            write_result(Path(flags.result), result, summary.to_json())
        if result.num_lost or summary.num_ok == 0:
            environment.process_exit_code = 1

    attach(environment, Conductor(environment, job, finished, failed))
