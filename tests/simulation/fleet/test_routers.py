"""Two routers side by side: one is killed, stopped, restarted; the workers forget it, and the other serves on."""

from __future__ import annotations

from collections import Counter

from tests.simulation.fleet.test_fleet import run
from tests.simulation.plan import Plan
from tests.simulation.run import never_judged, never_reached

SEEDS = (3, 4)


def test_a_router_that_goes_takes_nothing_with_it_but_its_own_streams():
    reached = Counter[str]()
    for plan in (Plan(seed, "routers", load_s=12.0) for seed in SEEDS):
        report = run(plan)
        reached += report.reached
    assert never_judged("routers", reached) == []
    assert never_reached("routers", reached) == []
