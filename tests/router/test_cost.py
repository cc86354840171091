"""The cost model's parts: tiers, and rates learned from receipts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.cost import CostModel, Held, KnownPrefix, fetch_tokens, learn_fetch, learn_prefill, prefill_terms

COST = CostModel()


@given(tiers=st.tuples(*[st.integers(0, 50)] * 4), num_skipped=st.integers(0, 250))
def test_a_tail_has_the_blocks_that_are_left_slowest_tiers_first(tiers, num_skipped):
    held = Held(sum(tiers), tiers)
    tail = held.tail(num_skipped)
    assert sum(tail) == max(held.num_blocks - num_skipped, 0)
    assert all(left <= there for left, there in zip(tail, tiers, strict=True))
    # Nothing of a tier is left out while a faster one is counted.
    fastest = next((tier for tier, count in enumerate(tail) if count), 4)
    assert all(tail[tier] == tiers[tier] for tier in range(fastest + 1, 4))


def test_the_slowest_tier_names_a_source():
    assert Held(3, (3, 0, 0, 0)).slowest_tier == "device"
    assert Held(3, (1, 0, 2, 0)).slowest_tier == "store"
    assert Held(3, (1, 0, 1, 1)).slowest_tier == "disk"


def test_what_is_expected_of_a_worker_adds_to_what_the_index_says():
    prefix = KnownPrefix(32, 10, {"a": Held(4, (3, 1, 0, 0)), "b": Held(8, (8, 0, 0, 0))}, {"a": 6, "b": 2, "c": 99})
    assert prefix.own("a") == Held(6, (5, 1, 0, 0))
    assert prefix.own("b") == Held(8, (8, 0, 0, 0))
    assert prefix.own("c") == Held(10, (10, 0, 0, 0))
    assert prefix.own("d") == Held(0, (0, 0, 0, 0))


def test_own_blocks_cost_nothing_in_the_paged_cache_and_a_load_in_slower_tiers():
    prefix = KnownPrefix(32, 10, {"a": Held(10, (10, 0, 0, 0)), "b": Held(10, (0, 10, 0, 0))})
    in_cache, in_host = (prefill_terms(COST, name, 7, 320, prefix) for name in "ab")
    assert (in_cache.load, in_cache.num_computed_tokens, in_cache.total) == (0.0, 1, 7 + COST.new_work_weight)
    assert in_cache.total < in_host.total < prefill_terms(COST, "c", 7, 320, prefix).total


def test_the_terms_add_up_in_the_explanation():
    prefix = KnownPrefix(32, 40, {"a": Held(3, (1, 2, 0, 0)), "b": Held(20, (0, 0, 20, 0))})
    terms = prefill_terms(COST, "a", 100, 1290, prefix).to_json()
    assert terms["total"] == terms["queued"] + terms["load"] + terms["fetch"] + terms["compute"]
    assert (terms["num_own_blocks"], terms["fetched_from"], terms["num_fetched_blocks"]) == (3, "b", 17)


def test_rates_follow_what_is_observed_and_only_what_can_be():
    cost = COST
    for _ in range(200):
        cost = learn_prefill(cost, 1000, 1.0)
        cost = learn_fetch(cost, "store", 3200, 0.105)
    assert cost.prefill_tokens_per_s == pytest.approx(1000, rel=0.01)
    assert cost.fetch_tokens_per_s[2] == pytest.approx(32_000, rel=0.01)
    assert cost.fetch_tokens_per_s[0] == COST.fetch_tokens_per_s[0]
    for useless in (learn_prefill(COST, 3, 1.0), learn_prefill(COST, 1000, 0.0), learn_fetch(COST, "tape", 1000, 1.0)):
        assert useless is COST
    assert math.isfinite(learn_prefill(COST, 10**9, 1e-9).prefill_tokens_per_s)


def test_a_faster_prefill_makes_fetching_dearer():
    fast = learn_prefill(COST, 10**6, 1.0)
    assert fetch_tokens(fast, (10, 0, 0, 0), 32) > fetch_tokens(COST, (10, 0, 0, 0), 32)
