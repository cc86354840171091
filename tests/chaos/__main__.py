"""Runs a fleet under load and faults, and prints what its clients saw; `make chaos MINUTES=10`.

    python -m tests.chaos --minutes 10 --seed 7
    python -m tests.chaos --restarts 200 --minutes 60         # kills and drains alone, as fast as they come
    python -m tests.chaos --idle-minutes 60 --restarts 0      # nothing at all for an hour, then many requests at once

Status 0: every answer was right, was cut by its client or failed with its router; nothing leaked; everybody serves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import network
from tests.chaos.faults import Nemesis
from tests.chaos.fleet import Fleet
from tests.chaos.load import Load
from tests.chaos.verdict import LOOK_S, Footprints, failures, table, unrest
from tests.hf_models import write_model

_DIRECTORY = Path("build/chaos")
_NUM_ROUNDS = 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults")
    parser.add_argument(
        "--restarts", type=int, help="end and start processes so often, or for --minutes; no other fault"
    )
    parser.add_argument("--faults", type=int, default=math.inf, help="deal so many, or for --minutes")
    parser.add_argument("--idle-minutes", type=float, default=0.0, help="before the faults, with a burst behind them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--cases", type=int, default=16, help="different requests, 16 at most")
    parser.add_argument("--patience", type=float, default=1.0, help="for a slow machine: all deadlines times this")
    parser.add_argument("--directory", type=Path, default=_DIRECTORY)
    flags = parser.parse_args(argv)
    with_networks = True
    try:
        network.enter()
    except network.NoNamespaces as error:
        with_networks = False
        print(f"nobody is cut off: {error}", flush=True)
    directory = flags.directory.resolve()
    model = directory.with_name(directory.name + "-model")
    if not model.exists():
        write_model(model, "qwen3")
    return asyncio.run(_run(Fleet(directory, model, with_networks, flags.patience), flags))


async def _run(fleet: Fleet, flags: argparse.Namespace) -> int:
    load, footprints = Load(fleet, flags.seed, flags.cases), Footprints(fleet)
    nemesis = Nemesis(fleet, flags.seed, only_restarts=flags.restarts is not None)
    problems: list[str] = []
    try:
        await asyncio.to_thread(fleet.start_all)
        await load.learn()
        looking = asyncio.create_task(footprints.run())
        if flags.idle_minutes:
            await asyncio.sleep(60 * flags.idle_minutes)
            await load.burst(_NUM_ROUNDS)
            late = sum(result.waited_s > 0 for result in load.results)
            problems += [f"{late} requests were not taken at once after the idle time"] * bool(late)
        stop = asyncio.Event()
        loading = asyncio.create_task(load.run(flags.rate, stop))
        try:
            await nemesis.run(60 * flags.minutes, flags.faults if flags.restarts is None else flags.restarts)
        except TimeoutError as error:
            problems.append(str(error))
        stop.set()
        await loading
        problems += nemesis.unexpected + await asyncio.to_thread(unrest, fleet)
        await load.close()  # its connections are no growth
        await asyncio.sleep(2 * LOOK_S)
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
        problems += footprints.growth() + failures(load)
    finally:
        await load.close()
        await asyncio.to_thread(fleet.close)
    print(table(load, nemesis, footprints), flush=True)
    for problem in problems[:20]:
        print(f"! {problem}")
    if problems:
        print(f"{len(problems)} problems; logs in {flags.directory}; the same faults: --seed {flags.seed}")
    report = {"problems": problems, "outcomes": load.counts, "faults": nemesis.dealt}
    (flags.directory / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
