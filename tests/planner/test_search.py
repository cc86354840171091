"""The search finds the cheapest fleet: as a full grid does, with few runs, and says so where there is none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.budgets import Objectives
from services.planner import Outcomes, Search, Shape, least_workers, simulate
from services.planner.job import Outcome
from services.planner.outcomes import Gaps
from tests.planner.test_simulation import SETUP, workload

NUM = 200


def outcomes(shape: Shape, good: float) -> Outcomes:
    """That share of the requests is good."""
    num_good = round(good * NUM)
    found = [Outcome(0.0, 1.0 if number < num_good else 9.0, 9.0, 1, 0, 1) for number in range(NUM)]
    return Outcomes(shape, Objectives(2.0, 1.0), found, Gaps(), 1.0, 1.0, 0.0, 0.0, 1)


def made_up(num_prefill: float, num_decode: float, num_colocated: float) -> Callable[[Shape], float]:
    """The share of good requests in a model in which so many of each kind are just enough."""

    def good(shape: Shape) -> float:
        shares = (shape.num_prefill / num_prefill, shape.num_decode / num_decode)
        share = min(shares) if shape.num_prefill else shape.num_decode / num_colocated
        return round(NUM * (1 - math.exp(-share * math.log(10)))) / NUM  # 0.9 at 1

    return good


def runs(good: Callable[[Shape], float]) -> Callable[[Shape], Outcomes]:
    return lambda shape: outcomes(shape, good(shape))


def cheapest_of_grid(good: Callable[[Shape], float], most: int) -> int | None:
    shapes = [Shape(p, d) for p, d in itertools.product(range(1, most), range(1, most)) if p + d <= most]
    return min((each.num_workers for each in shapes if good(each) >= 0.9), default=None)


@settings(max_examples=15)
@given(st.floats(0.2, 12), st.floats(0.2, 12), st.floats(0.2, 40))
def test_the_cheapest_is_that_of_the_full_grid(num_prefill: float, num_decode: float, num_colocated: float) -> None:
    good = made_up(num_prefill, num_decode, num_colocated)
    search = Search(runs(good), 0.9, 24)
    search.look(1)
    split, colocated = search.best["prefill and decode"], search.best["colocated"]
    assert (split and split.num_workers) == cheapest_of_grid(good, 24)
    needed = next((n for n in range(1, 25) if good(Shape(0, n)) >= 0.9), None)
    assert (colocated and colocated.num_workers) == needed
    assert len(search.tried) < 80  # of 300


def test_what_is_bound_by_one_side_alone_ends() -> None:
    """Prompts of it are late whoever computes them: more workers change nothing."""
    search = Search(lambda shape: outcomes(shape, 0.4), 0.9, 64)
    search.look(1)
    assert search.cheapest is None
    assert set(search.best.values()) == {None}
    assert len(search.tried) < 40


@pytest.mark.slow
def test_a_real_fleet_is_as_small_as_the_grid_says() -> None:
    requests = workload(150, rate=40)

    def run(shape: Shape) -> Outcomes:
        return simulate(requests, shape, SETUP, takes_steps=False)

    search = Search(run, 0.9, 5)
    search.look(least_workers(requests, SETUP, 0.9))
    split = search.best["prefill and decode"]
    assert split is not None
    assert split.num_workers == cheapest_of_grid(lambda shape: search.outcomes(shape).good, 5)


def test_what_steps_do_not_confirm_is_made_larger() -> None:
    search = Search(runs(made_up(1.9, 1.9, 9)), 0.9, 24)
    search.look(1)
    assert search.cheapest == Shape(2, 2)
    search.confirm(runs(made_up(2.5, 2.9, 9)))
    assert search.best == {
        "colocated": Shape(0, 9),
        "prefill and decode": Shape(3, 3),
        "elastic": Shape(3, 3, is_elastic=True),
    }
    assert Shape(2, 2) in search.confirmed


@pytest.mark.parametrize("rate", [5.0, 50.0, 500.0])
def test_no_fleet_smaller_than_the_bound_is_enough(rate: float) -> None:
    requests = workload(200, rate=rate)
    least = least_workers(requests, SETUP, 0.9)
    if least > 1:
        below = simulate(requests, Shape(0, least - 1), SETUP, takes_steps=False)
        assert below.good < 0.9
