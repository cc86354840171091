"""What the bench of elastic fleets sends, and what it calls good."""

from __future__ import annotations

import argparse

import pytest

from loadtest.plan import Outcome, RequestRecord, Scale, TraceRequest
from tests.bench.bench_elastic import Half, arrivals, factors, result_of, scaled

OPTIONS = argparse.Namespace(ttft=1000.0, tpot=50.0)


def record(ttft_s: float, tpot_s: float, outcome: Outcome = Outcome.OK) -> RequestRecord:
    first_s = 10 + ttft_s
    return RequestRecord(
        0, "0", 0, False, 10.0, 10.0, first_s + 4 * tpot_s, outcome, "", first_s, (tpot_s,) * 4, 100, 0, 5
    )


def test_lengths_come_to_the_means_of_their_half():
    requests = [TraceRequest(0.0, 1000 * n, 40 * n, tuple(range(2 * n))) for n in (1, 2, 3)]
    prompt_factor, output_factor = factors(requests, Half(500, 8))
    assert (prompt_factor, output_factor) == pytest.approx((0.25, 0.1))
    scale = Scale(prompt_factor, 10_000, 10_000)
    sent = [scaled(each, prompt_factor, output_factor) for each in requests]
    assert [scale.prompt_tokens(each) for each in sent] == [250, 500, 750]
    assert [scale.output_tokens(each) for each in sent] == [4, 8, 12]


def test_good_is_what_met_both_objectives_and_did_not_fail():
    records = [
        record(0.5, 0.04),
        record(1.5, 0.04),
        record(0.5, 0.06),
        record(0.5, 0.04, Outcome.REFUSED),
    ]
    result = result_of(records, OPTIONS, 2)
    assert (result.good_share, result.num_failed, result.num_flips) == (0.25, 1, 2)
    assert result.good_per_s == pytest.approx(0.1)


def test_arrivals_are_the_same_for_every_fleet():
    assert arrivals(50, 4.0, 7) == arrivals(50, 4.0, 7)
    assert arrivals(4000, 4.0, 7)[-1] == pytest.approx(1000, rel=0.1)
