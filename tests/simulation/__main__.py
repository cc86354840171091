"""Runs seeds for a time, adds them to a tally, and prints what they have reached; `make simulate MINUTES=60`.

python -m tests.simulation --minutes 5          seeds that no run here has had, on all cores; --twice: each two times
python -m tests.simulation --world fleet        the same of a small fleet alone; by default all worlds have equal times
python -m tests.simulation --seed 123           one seed, and what it broke; --shrink: the least of it that breaks that
python -m tests.simulation --removals           for each safeguard, the first seeds that fail without it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from tests.simulation.exhaustive import STATES
from tests.simulation.ledger import Report
from tests.simulation.plan import LOAD_S, Plan
from tests.simulation.removals import REMOVALS
from tests.simulation.run import WORLDS, never_judged, never_reached, simulate
from tests.simulation.shrink import shrink
from tests.simulation.watching import all_transitions
from tests.states.rows import all_rows

TALLIES = Path("build/simulation")
_SECOND_RUN_EVERY = 20  # seeds: each of these runs twice in any case, and leaves the same trace or is a failure
_SEEDS_FOR_ALL = 400  # in so many every situation must have arisen
_MAX_REMOVAL_SEEDS = 10_000
_MAX_SHRINKS = 60


class Tally:
    """What all runs here have come to; one JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.num_seeds = int(known.get("num_seeds", 0))
        self.next_seed = int(known.get("next_seed", 0))
        self.seconds = float(known.get("seconds", 0.0))
        self.core_s = float(known.get("core_s", 0.0))
        self.num_callbacks = int(known.get("num_callbacks", 0))
        self.virtual_s = float(known.get("virtual_s", 0.0))
        self.failed: dict[str, str] = dict(known.get("failed", {}))
        self.faults: Counter[str] = Counter(known.get("faults", {}))
        self.reached: Counter[str] = Counter(known.get("reached", {}))
        self.transitions: Counter[str] = Counter(known.get("transitions", {}))

    def add(self, report: Report) -> None:
        self.num_seeds += 1
        self.next_seed = max(self.next_seed, report.plan.seed + 1)
        self.num_callbacks += report.num_callbacks
        self.virtual_s += report.virtual_s
        self.faults += report.faults
        self.reached += report.reached
        self.transitions += report.transitions
        if report.violations:
            self.failed[str(report.plan.seed)] = str(report.violations[0])

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        names = [name for name in vars(self) if not name.startswith("_")]
        text = json.dumps({name: getattr(self, name) for name in names}, indent=1)
        self._path.write_text(text, encoding="utf-8")

    def page(self) -> str:
        rows, met, rate = all_transitions() | all_rows(), set(self.transitions), self.num_seeds / self.seconds
        of_all, of_met = (Counter(row.split()[0] for row in those) for those in (rows, rows & met))
        entries = (f"{table} {count} of {of_all[table]}" for table, count in sorted(of_met.items()))
        lines = [
            f"seeds        {self.num_seeds:,} in {self.seconds / 60:.1f} min: {rate:.1f} a second,"
            f" {self.core_s / max(self.num_seeds, 1):.2f} s of a core each",
            f"simulated    {self.virtual_s / 3600:,.1f} h, {self.num_callbacks:,} callbacks",
            "entries      " + ", ".join(entries),
            f"failed       {len(self.failed)} seeds {' '.join(list(self.failed)[:10])}",
            "faults       " + ", ".join(f"{kind} {count:,}" for kind, count in self.faults.most_common()),
            "reached      " + ", ".join(f"{what} {count:,}" for what, count in self.reached.most_common()),
        ]
        return "\n".join(lines)


def run_for(minutes: float, world: str, is_twice: bool, num_processes: int) -> int:
    """Run seeds in several processes; 1 where one has failed, or a situation has never arisen."""
    tally, start_s = Tally(TALLIES / f"{world}.json"), time.monotonic()
    before_s, num_failed, next_seed = tally.seconds, 0, tally.next_seed
    running: set[Future[tuple[Report, bool, float]]] = set()
    with ProcessPoolExecutor(num_processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while True:
            while time.monotonic() - start_s < minutes * 60 and len(running) < 2 * num_processes:
                again = is_twice or next_seed % _SECOND_RUN_EVERY == 0
                running.add(pool.submit(_run_one, Plan(next_seed, world), again))
                next_seed += 1
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            num_failed += sum(_book(tally, *each.result()) for each in done)
            tally.seconds = before_s + time.monotonic() - start_s
            tally.save()
    print(f"---- {world}\n{tally.page()}")
    has_enough = tally.num_seeds >= _SEEDS_FOR_ALL
    unseen = [*never_judged(world, tally.reached), *never_reached(world, tally.reached)] if has_enough else []
    if unseen:
        print(f"never seen: {', '.join(unseen)}: checks of these show nothing")
    return 1 if num_failed or unseen else 0


def _run_one(plan: Plan, is_twice: bool) -> tuple[Report, bool, float]:
    """Its report, whether a second run left the same, and the seconds of a core that the first took."""
    start_s = time.process_time()
    report = simulate(plan)
    took_s = time.process_time() - start_s
    return report, not is_twice or bool(report.violations) or simulate(plan) == report, took_s


def _book(tally: Tally, report: Report, is_same: bool, core_s: float) -> bool:
    """Whether the seed has failed."""
    plan = report.plan
    tally.add(report)
    tally.core_s += core_s
    if report.violations:
        print(f"seed {plan.seed}: {report.violations[0]}\n  {plan.command()}", flush=True)
        print(f"  shrunk: {shrink(plan, simulate, _MAX_SHRINKS).command()}", flush=True)
    elif not is_same:
        tally.failed[str(plan.seed)] = "the second run left another trace"
        print(f"seed {plan.seed}: the second run left another trace\n  {plan.command()}", flush=True)
    return bool(report.violations) or not is_same


def show(plan: Plan, without: str | None, is_shrunk: bool) -> int:
    with REMOVALS[without].take_out() if without else contextlib.nullcontext():
        if is_shrunk:
            plan = shrink(plan, simulate)
            print(plan.command(without))
        report = simulate(plan)
    for line in (*report.story, *map(str, report.violations)):
        print(line)
    print(f"seed {plan.seed}: {len(report.violations)} violations, {report.num_callbacks:,} callbacks", end=", ")
    print(f"{report.virtual_s:.1f} s, {len(report.parts)} parts, trace {report.trace}")
    print(f"faults {dict(report.faults)}\nreached {dict(report.reached)}")
    return 1 if report.violations else 0


def search_removals() -> int:
    num_unseen = 0
    for name, removal in REMOVALS.items():
        for seed in range(_MAX_REMOVAL_SEEDS):
            with removal.take_out():
                violations = simulate(Plan(seed, removal.world)).violations
            if violations and violations[0].invariant is removal.breaks:
                print(f"{name}: seed {seed}: {violations[0]}\n  {Plan(seed, removal.world).command(name)}", flush=True)
                break
        else:
            num_unseen += 1
            print(f"{name}: nobody missed it in {_MAX_REMOVAL_SEEDS} seeds")
    return 1 if num_unseen else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to run seeds")
    parser.add_argument("--world", choices=WORLDS, help="what is simulated; by default all, one after the other")
    parser.add_argument("--twice", action="store_true", help="run each seed twice: equal seeds leave equal traces")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time; all cores")
    parser.add_argument("--seed", type=int, help="run this one, and show what it broke")
    parser.add_argument("--only", help="with --seed: these parts of its schedule, separated by commas")
    parser.add_argument("--load-s", type=float, default=LOAD_S, help="with --seed: how long faults are dealt")
    parser.add_argument("--shrink", action="store_true", help="with --seed: look for less that breaks the same")
    parser.add_argument("--without", choices=REMOVALS, help="with --seed: take this safeguard out")
    parser.add_argument("--removals", action="store_true", help="search the seed that misses each safeguard")
    given = parser.parse_args()
    if given.removals:
        return search_removals()
    if given.seed is None:
        worlds = [given.world] if given.world is not None else list(WORLDS)
        minutes = given.minutes / len(worlds)
        failed = max(run_for(minutes, world, given.twice, given.jobs) for world in worlds)
        if STATES.exists():
            print(f"---- states explored: {STATES.read_text(encoding='utf-8')}")
        return failed
    only = frozenset(given.only.split(",")) if given.only is not None else None
    return show(Plan(given.seed, given.world or "exchange", only, given.load_s), given.without, given.shrink)


if __name__ == "__main__":
    sys.exit(main())
