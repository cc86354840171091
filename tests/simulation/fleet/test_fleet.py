"""A small fleet under seeded faults: every token of every stream is right, and nothing is lost, blamed or left over."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.plan import Plan
from tests.simulation.run import never_judged, never_reached, simulate
from tests.simulation.shrink import shrink

SEEDS = (20, 27, 29)


def test_whatever_happens_each_stream_has_its_tokens_and_the_situations_arise():
    reached = Counter[str]()
    for plan in (Plan(seed, "fleet") for seed in SEEDS):
        report = simulate(plan)
        if report.violations:
            pytest.fail(f"{report.violations[0]}\n{plan.command()}\nshrunk: {shrink(plan, simulate, 20).command()}")
        reached += report.reached
    assert simulate(plan) == report, f"the second run left another trace: {plan.command()}"
    assert never_judged("fleet", reached) == []
    assert never_reached("fleet", reached) == []
