"""What the goodput bench makes of vLLM's reports, and where it looks for a target's best rate."""

from __future__ import annotations

import argparse

import pytest

from tests.bench.bench_goodput import Served, Target, search, served_of

OPTIONS = argparse.Namespace(ttft=1000.0, tpot=50.0)


def test_a_request_is_good_if_both_objectives_are_met_and_a_failed_one_is_not() -> None:
    report = {
        "ttfts": [0.5, 1.5, 0.5, 0.0],
        "itls": [[0.04, 0.06], [0.01, 0.01], [0.2, 0.2], []],
        "output_lens": [3, 3, 5, 0],
        "duration": 2.0,
    }
    served = served_of(report, 2.0, OPTIONS)

    assert served.tpot == pytest.approx([50, 10, 100])
    assert served.good_share == 0.25
    assert served.good_per_s == 0.5
    assert served.achieved == 1.5


def test_goodput_is_looked_for_above_the_highest_rate_that_is_kept() -> None:
    target, tried = Target("one", ""), list[float]()

    def run(_: Target, rate: float) -> Served:
        tried.append(rate)
        share = 1.0 if rate <= 1.2 else max(0.0, 1.5 - rate / 2.4)
        return Served(rate, rate, [1.0], [1.0], [1.0], share, rate * share)

    search(target, 0.5, run, good=0.9)

    assert target.best_rate == 1.8  # 75 % of it are good, and more each second than of 1.2
    assert len(tried) == len(set(tried))
