"""`tandem plan TRACE --ttft MS --tpot MS`: prints the cheapest fleet that meets the objectives, by simulation."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from services.cli.config import PlanConfig
from services.settings import SettingsError, build_settings, collect_settings, make_parser, refuse, settings_of

if TYPE_CHECKING:
    from services.planner import Outcomes, Search, Setup, Shape, Workload

_PROG = "tandem plan"


def main(argv: Sequence[str]) -> int:
    """Print the plan; returns 2 where no fleet is enough, or trace or settings are wrong."""
    parser = make_parser(
        PlanConfig,
        prog=_PROG,
        description="Simulates fleets in virtual time and names the cheapest that meets the objectives.",
        positional="trace",
    )
    try:
        config = build_settings(PlanConfig, collect_settings(settings_of(PlanConfig), argv, os.environ, parser))
        meaning = {each.name: each.help for each in settings_of(PlanConfig)}
        for name in ("trace", "ttft", "tpot"):
            if not getattr(config, name):
                raise SettingsError(f"give {'TRACE' if name == 'trace' else f'--{name}'}: {meaning[name]}")
        # Here and not above: --help must not pay for them.
        from services.cli.plan.requests import read_workload
        from services.cli.plan.speed import read_speed

        rates, limits, origin = read_speed(config)
        workload = read_workload(config)
    except (SettingsError, ValueError, OSError) as error:
        refuse(_PROG, error)
    from services.budgets import Objectives
    from services.planner import Setup

    objectives = Objectives(config.ttft / 1000, config.tpot / 1000)
    setup = Setup(rates, objectives, limits)
    say(f"{workload.description}, {workload.rate:.3g} a second; a worker: {origin}")
    found = look(config, workload, setup)
    return tell(config, workload, found)


def say(line: str) -> None:
    """Tell how it goes, beside the result."""
    print(line, file=sys.stderr, flush=True)


def look(config: PlanConfig, workload: Workload, setup: Setup) -> Search:
    """Try fleets of every kind."""
    from services.planner import Search, least_workers, simulate

    def run(shape: Shape, takes_steps: bool = False) -> Outcomes:
        started_s = time.monotonic()
        outcomes = simulate(workload, shape, setup, takes_steps=takes_steps)
        how = "step by step" if takes_steps else "in leaps"
        say(
            f"{shape!s:<14} {outcomes.good:7.1%} good, {outcomes.num_steps:,} steps {how},"
            f" in {time.monotonic() - started_s:.1f} s"
        )
        return outcomes

    search = Search(run, config.good / 100, config.max_workers)
    least = least_workers(workload, setup, search.good)
    search.look(least)
    search.confirm(lambda shape: run(shape, takes_steps=True))
    return search


def tell(config: PlanConfig, workload: Workload, search: Search) -> int:
    """Print the result, and draw it; returns the exit status."""
    from services.cli.plan.table import as_json, table

    print(json.dumps(as_json(search), indent=2) if config.json else table(search))
    if config.plot:
        from services.cli.plan.plot import page

        try:
            Path(config.plot).write_text(page(search, workload), encoding="utf-8")
        except OSError as error:
            refuse(_PROG, error)
    if search.cheapest is None:
        nearest = max(search.tried.values(), key=lambda each: each.good)
        say(
            f"{_PROG}: error: no fleet of at most {config.max_workers} workers has {config.good:g} % of the requests"
            f" good; the nearest is {nearest.shape}, with {nearest.good:.1%}: TTFT p90"
            f" {nearest.ttft.p90 * 1e3:,.0f} ms, TPOT p90 {nearest.tpot.p90 * 1e3:,.1f} ms. Give more"
            " --max-workers, or other objectives: a lone request may take longer than they allow"
        )
        return 2
    return 0
