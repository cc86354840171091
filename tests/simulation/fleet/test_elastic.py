"""Elastic workers, bent and redirected at random, under seeded faults: nothing is wrong, lost, blamed or left over."""

from __future__ import annotations

from collections import Counter

from tests.simulation.fleet.test_fleet import run
from tests.simulation.plan import Plan
from tests.simulation.run import never_judged, simulate

SEEDS = (3, 4)


def test_a_fleet_whose_roles_bend_says_what_an_undisturbed_engine_says():
    reached, faults = Counter[str](), Counter[str]()
    for plan in (Plan(seed, "elastic", load_s=8.0) for seed in SEEDS):
        report = run(plan)
        reached += report.reached
        faults += report.faults
    assert simulate(plan) == report, f"the second run left another trace: {plan.command()}"
    assert never_judged("elastic", reached) == []
    assert {"bent", "redirected"} <= set(faults)
    assert {"deflected: prompt", "deflected: answer", "redirect sent", "redirected", "handed over"} <= set(reached)
