"""Arrival processes have the rate and the burstiness that they were asked for, and depend on the seed alone."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.plan import arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_mean_and_the_spread_of_their_shape(burstiness: float) -> None:
    times = arrivals.gamma(5.0, burstiness, 20_000, random.Random(1))
    gaps = [right - left for left, right in pairwise([0.0, *times])]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_burstiness_one_is_a_poisson_process() -> None:
    """In a Poisson process the number of arrivals in windows of equal length has its mean as its variance."""
    times = arrivals.gamma(10.0, 1.0, 20_000, random.Random(2))
    counts = [0] * (int(times[-1]) + 1)
    for time in times:
        counts[int(time)] += 1
    assert statistics.pvariance(counts[:-1]) == pytest.approx(statistics.fmean(counts[:-1]), rel=0.1)


@given(st.floats(0.01, 1000), st.floats(0.1, 10), st.integers(0, 50), st.integers())
def test_arrivals_ascend_and_depend_on_the_seed_alone(rate: float, burstiness: float, number: int, seed: int) -> None:
    times = arrivals.gamma(rate, burstiness, number, random.Random(seed))
    assert times == arrivals.gamma(rate, burstiness, number, random.Random(seed))
    assert len(times) == number
    assert times == sorted(times)
    assert all(time >= 0 for time in times)


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert arrivals.constant(4.0, 3) == [0.25, 0.5, 0.75]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.floats(0.01, 1000))
def test_a_stretched_trace_has_the_rate_and_keeps_its_proportions(times: list[float], rate: float) -> None:
    times.sort()
    if times[-1] - times[0] < 1e-3:
        return
    stretched = arrivals.stretched(times, rate)
    assert stretched[0] == 0
    assert (len(times) - 1) / (stretched[-1] - stretched[0]) == pytest.approx(rate)
    factor = stretched[-1] / (times[-1] - times[0])
    for before, after in zip(times, stretched, strict=True):
        assert after == pytest.approx((before - times[0]) * factor, abs=1e-6)


def test_a_trace_of_one_moment_has_no_rate() -> None:
    with pytest.raises(ValueError, match="one moment"):
        arrivals.stretched([3.0, 3.0], 1.0)


@given(st.lists(st.integers(0, 10), min_size=1, max_size=40), st.integers())
def test_ties_are_spread_within_the_clock_and_stay_in_order(stamps: list[int], seed: int) -> None:
    times = [3.0 * stamp for stamp in sorted(stamps)]
    spread = arrivals.spread_ties(times, random.Random(seed))
    assert len(spread) == len(times)
    assert spread == sorted(spread)
    later = {time: min((each for each in times if each > time), default=None) for time in times}
    for before, after in zip(times, spread, strict=True):
        limit = later[before]
        assert before <= after
        assert limit is None or after <= limit


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be positive"):
        arrivals.constant(rate, 3)
