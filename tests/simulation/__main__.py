"""Runs seeds for a time, adds them to a tally, and prints what they have reached; `make simulate MINUTES=60`.

python -m tests.simulation --minutes 5          seeds that no run here has had, on all cores; --twice: each two times
python -m tests.simulation --world fleet        the same of a small fleet alone; by default all worlds share the time
python -m tests.simulation --tally              what all runs here have come to
python -m tests.simulation --seed 123           one seed, and what it broke; --shrink: the least of it that breaks that
python -m tests.simulation --removals           for each safeguard, the first seeds that fail without it
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Final

import torch

from tests.simulation.exhaustive import STATES
from tests.simulation.plan import Plan
from tests.simulation.removals import REMOVALS
from tests.simulation.run import WORLDS, never_judged, never_reached, simulate
from tests.simulation.shrink import shrink
from tests.simulation.tally import Tally

SHARES: Final = {"pair": 0.55, "exchange": 0.1, "fleet": 0.1, "elastic": 0.1, "routers": 0.1, "restarts": 0.05}
"""Of the time. Most seeds are of the pair: they are cheap."""
_ROUND_MINUTES = 10.0
_SEEDS_AT_ONCE: Final = {"pair": 50, "exchange": 5}
_SECOND_RUN_EVERY: Final = {"pair": 20, "exchange": 20}
"""Seeds, of other worlds every one: each of these runs twice in any case, and leaves the same trace or is a failure."""
_SEEDS_FOR_ALL = 400  # in so many every situation must have arisen
_MAX_REMOVAL_SEEDS = 10_000
_MAX_SHRINKS = 60


def run_all(minutes: float, worlds: Sequence[str], is_twice: bool, num_processes: int) -> int:
    """Run seeds of these worlds in turn; 1 where one has failed, or a situation has never arisen."""
    share_of_all = sum(SHARES[world] for world in worlds)
    num_rounds = max(1, round(minutes / _ROUND_MINUTES))
    num_failed = 0
    for number in range(num_rounds):
        for world in worlds:
            world_s = 60 * minutes / num_rounds * SHARES[world] / share_of_all
            ran = run_for(world_s, world, is_twice, num_processes)
            num_failed += len(ran.failed)
            took = f"{ran.num_seeds:,} seeds in {ran.seconds:.0f} s, {len(ran.failed)} failed"
            print(f"round {number + 1} of {num_rounds}, {world}: {took}", flush=True)
    return 1 if show_tallies(worlds) or num_failed else 0


def run_for(run_s: float, world: str, is_twice: bool, num_processes: int) -> Tally:
    """Run seeds in several processes, and add them to the world's tally; what these have come to."""
    ran, start_s, before = Tally(), time.monotonic(), Tally.read(world)
    next_seed, num_at_once = before.next_seed, _SEEDS_AT_ONCE.get(world, 1)
    running: set[Future[tuple[Tally, list[str]]]] = set()
    with ProcessPoolExecutor(num_processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while True:
            while time.monotonic() - start_s < run_s and len(running) < 2 * num_processes:
                seeds = range(next_seed, next_seed + num_at_once)
                running.add(pool.submit(run_some, world, seeds, is_twice))
                next_seed = seeds.stop
            if not running:
                return ran
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                some, said = each.result()
                ran.merge(some)
                for line in said:
                    print(line, flush=True)
            ran.seconds = time.monotonic() - start_s
            total = Tally()
            total.merge(before)
            total.merge(ran)
            total.save(world)


def run_some(world: str, seeds: range, is_twice: bool) -> tuple[Tally, list[str]]:
    """What these seeds have come to, and what is to be said of those that have failed."""
    tally, said = Tally(), list[str]()
    for plan in (Plan(seed, world) for seed in seeds):
        start_s = time.process_time()
        report = simulate(plan)
        tally.core_s += time.process_time() - start_s
        tally.add(report)
        if report.violations:
            least = shrink(plan, simulate, _MAX_SHRINKS).command()
            said += [f"seed {plan.seed}: {report.violations[0]}", f"  {plan.command()}", f"  shrunk: {least}"]
        elif (is_twice or plan.seed % _SECOND_RUN_EVERY.get(world, 1) == 0) and simulate(plan) != report:
            tally.failed[str(plan.seed)] = "the second run left another trace"
            said += [f"seed {plan.seed}: the second run left another trace", f"  {plan.command()}"]
    return tally, said


def show_tallies(worlds: Sequence[str]) -> bool:
    """Print what all runs here have come to; whether a situation has never arisen."""
    num_seeds, unseen = 0, list[str]()
    for world in worlds:
        tally = Tally.read(world)
        num_seeds += tally.num_seeds
        print(f"---- {world}\n{tally.page()}")
        if tally.num_seeds >= _SEEDS_FOR_ALL:
            missing = [*never_judged(world, tally.reached), *never_reached(world, tally.reached)]
            unseen += [f"{what} ({world})" for what in missing]
    print(f"---- {num_seeds:,} seeds in all")
    if STATES.exists():
        print(f"---- states explored: {STATES.read_text(encoding='utf-8')}")
    if unseen:
        print(f"never seen: {', '.join(unseen)}: checks of these show nothing")
    return bool(unseen)


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


def search_removals(world: str | None) -> int:
    """For each safeguard the first seed that misses it; with `world`, those of the exchange in that world."""
    num_unseen = 0
    for name, removal in REMOVALS.items():
        if world is not None and removal.world != "exchange":
            continue
        for plan in (Plan(seed, world or removal.world) for seed in range(_MAX_REMOVAL_SEEDS)):
            with removal.take_out():
                violations = simulate(plan).violations
            if violations and violations[0].invariant is removal.breaks:
                print(f"{name}: seed {plan.seed}: {violations[0]}\n  {plan.command(name)}", flush=True)
                break
        else:
            num_unseen += 1
            print(f"{name}: nobody missed it in {_MAX_REMOVAL_SEEDS} seeds", flush=True)
    return 1 if num_unseen else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to run seeds")
    parser.add_argument("--world", choices=WORLDS, help="what is simulated; by default all, one after the other")
    parser.add_argument("--tally", action="store_true", help="run nothing; show what all runs here have come to")
    parser.add_argument("--twice", action="store_true", help="run each seed twice: equal seeds leave equal traces")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time; all cores")
    parser.add_argument("--seed", type=int, help="run this one, and show what it broke")
    parser.add_argument("--only", help="with --seed: these parts of its schedule, separated by commas")
    parser.add_argument("--load-s", type=float, default=0.0, help="with --seed: how long faults are dealt")
    parser.add_argument("--shrink", action="store_true", help="with --seed: look for less that breaks the same")
    parser.add_argument("--without", choices=REMOVALS, help="with --seed: take this safeguard out")
    parser.add_argument("--removals", action="store_true", help="search the seed that misses each safeguard")
    given = parser.parse_args()
    worlds = [given.world] if given.world is not None else list(WORLDS)
    if given.removals:
        return search_removals(given.world)
    if given.tally:
        return int(show_tallies(worlds))
    if given.seed is None:
        return run_all(given.minutes, worlds, given.twice, given.jobs)
    only = frozenset(given.only.split(",")) if given.only is not None else None
    return show(Plan(given.seed, given.world or "exchange", only, given.load_s), given.without, given.shrink)


if __name__ == "__main__":
    sys.exit(main())
