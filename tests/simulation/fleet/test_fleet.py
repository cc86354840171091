"""A small fleet under seeded faults: every token of every stream is right, and nothing is lost, blamed or left over."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.fleet.wishes import KINDS
from tests.simulation.fleet.world import simulate_idle
from tests.simulation.ledger import Report
from tests.simulation.plan import Plan
from tests.simulation.run import never_judged, simulate
from tests.simulation.shrink import shrink

SEEDS = (20, 27, 29)
NUM_RESTARTS = 1000


def run(plan: Plan) -> Report:
    """Run it, and fail with the least that breaks the same."""
    report = simulate(plan)
    if report.violations:
        pytest.fail(f"{report.violations[0]}\n{plan.command()}\nshrunk: {shrink(plan, simulate, 20).command()}")
    return report


def test_whatever_happens_each_stream_has_its_tokens_and_the_situations_arise():
    reached = Counter[str]()
    for plan in (Plan(seed, "fleet") for seed in SEEDS):
        report = run(plan)
        reached += report.reached
    assert simulate(plan) == report, f"the second run left another trace: {plan.command()}"
    assert never_judged("fleet", reached) == []
    # All that many runs must come to is in `run.REQUIRED`; this is what three come to.
    assert {f"asked for: {kind}" for kind in KINDS} <= set(reached)
    assert {"handed over", "prefix fetched from device", "brought back from the host tier"} <= set(reached)
    assert {"handoff failed", "ended: left", "lost Redis", "index announced anew"} <= set(reached)


@pytest.mark.parametrize("idle_s", [240.0, pytest.param(3600.0, marks=pytest.mark.slow)])
def test_after_a_time_without_a_request_the_first_ones_are_served(idle_s: float):
    report = simulate_idle(idle_s)
    assert report.violations == ()
    assert report.virtual_s > idle_s


def test_processes_that_are_restarted_one_after_the_other_leave_nothing_wedged():
    report = run(Plan(0, "restarts"))
    assert report.reached["restarted"] > 10


@pytest.mark.slow
def test_a_thousand_restarts_leave_nothing_wedged():
    reached, seed = Counter[str](), 0
    while reached["restarted"] < NUM_RESTARTS:
        reached += run(Plan(seed, "restarts")).reached
        seed += 1
    assert never_judged("restarts", reached) == []
    print(f"{reached['restarted']:,} restarts in {seed} seeds")
