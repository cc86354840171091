"""Generated workloads have the percentiles, the turns and the sharing that the published traces have."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from loadtest.plan import arrivals
from loadtest.plan.published import MOONCAKE, Percentiles, azure_like
from loadtest.plan.traces import TraceRequest


def percentiles(values: list[int], percents: tuple[int, ...]) -> list[int]:
    ordered = sorted(values)
    return [ordered[len(ordered) * percent // 100] for percent in percents]


def hit_share(requests: list[TraceRequest]) -> float:
    """Of the blocks of all prompts, those that an unbounded cache has as a prefix."""
    known: set[int] = set()
    num_hits = 0
    for request in requests:
        for block_id in request.block_ids:
            if block_id not in known:
                break
            num_hits += 1
        known.update(request.block_ids)
    return num_hits / sum(len(each.block_ids) for each in requests)


def test_percentiles_are_met_and_interpolated_in_the_logarithm() -> None:
    values = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
    table = Percentiles(values)
    assert [table.at(share) for share in (0, 0.5, 0.75, 0.9, 1.0)] == [1, 32, 64, 128, 4096]
    assert table.at(0.625) == 45, "halfway between 32 and 64"


def test_azure_lengths_have_the_published_percentiles() -> None:
    requests = azure_like([0.0] * 20_000, random.Random(0))
    prompts = percentiles([each.input_length for each in requests], (10, 50, 90))
    answers = percentiles([each.output_length for each in requests], (10, 50, 90))
    assert prompts == pytest.approx([207, 1020, 2734], rel=0.05)
    assert answers == pytest.approx([54, 129, 424], rel=0.05)


def test_mooncake_conversations_are_as_long_and_share_as_much_as_published() -> None:
    rng = random.Random(0)
    times = arrivals.gamma(3.4, 1.0, 12_031, rng)
    requests = MOONCAKE.requests(times, rng)
    assert [each.at_s for each in requests] == times, "the arrival process is the one asked for"
    assert percentiles([each.input_length for each in requests], (50, 90)) == pytest.approx([6909, 27367], rel=0.1)
    assert percentiles([each.output_length for each in requests], (50, 90)) == pytest.approx([350, 597], rel=0.1)
    assert sum(each.turn > 0 for each in requests) / len(requests) == pytest.approx(0.33, abs=0.03)
    assert hit_share(requests) == pytest.approx(0.366, abs=0.03)


def test_another_rate_shares_as_much() -> None:
    """Think times are stretched with the rate: as many requests of others come between two turns."""
    rates = [hit_share(MOONCAKE.requests(arrivals.constant(rate, 3000), random.Random(1))) for rate in (0.5, 50.0)]
    assert rates[0] == pytest.approx(rates[1], abs=0.02)


def test_a_turn_repeats_the_whole_blocks_of_the_one_before() -> None:
    requests = MOONCAKE.requests(arrivals.constant(3.4, 3000), random.Random(2))
    by_blocks = {each.block_ids: each for each in requests}
    later = [each for each in requests if each.turn]
    assert later
    prefixes = {blocks[: each.input_length // 512]: each for blocks, each in by_blocks.items()}
    for request in later:
        shared = [length for length in range(1, len(request.block_ids)) if request.block_ids[:length] in prefixes]
        assert shared, "its beginning is the whole blocks of an earlier prompt"
    assert all(len(each.block_ids) == -(-each.input_length // 512) for each in requests)
    assert all(left.at_s < right.at_s for left, right in pairwise(requests))
