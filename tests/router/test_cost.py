"""The cost model's parts: tiers, and times by what workers say of their speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rates import Rates
from services.router.routing import CostModel, Held, KnownPrefix
from services.router.routing.cost import PrefillTerms, handoff_tokens, prefill_work

COST = CostModel()


def prefill_terms(
    cost: CostModel, worker_id: str, num_queued: int, num_tokens: int, prefix: KnownPrefix
) -> PrefillTerms:
    return prefill_work(cost, prefix.own(worker_id), num_tokens, prefix).at(worker_id, num_queued)


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
    assert (in_cache.load, in_cache.num_computed_tokens) == (0.0, 1)
    assert in_cache.total == pytest.approx(7 + COST.new_work_weight, rel=0.02)
    assert in_cache.total < in_host.total < prefill_terms(COST, "c", 7, 320, prefix).total


def test_the_terms_add_up():
    prefix = KnownPrefix(32, 40, {"a": Held(3, (1, 2, 0, 0)), "b": Held(20, (0, 0, 20, 0))})
    terms = prefill_terms(COST, "a", 100, 1290, prefix)
    assert terms.total == terms.queued + terms.load + terms.fetch + terms.compute
    assert (terms.num_own_blocks, terms.fetched_from, terms.num_fetched_blocks) == (3, "b", 17)


def test_a_faster_prefill_makes_fetching_dearer():
    slow, fast = (handoff_tokens(CostModel(Rates(prompt_token_s=each)), 10, 32) for each in (1e-3, 1e-5))
    assert fast > 10 * slow


def test_a_fetch_is_expected_exactly_where_the_worker_would_fetch():
    prefix = KnownPrefix(32, 40, {"a": Held(3, (3, 0, 0, 0)), "b": Held(20, (20, 0, 0, 0))})
    for token_s in (1e-6, 1e-5, 3e-5, 1e-4, 1e-3):
        cost = CostModel(Rates(prompt_token_s=token_s))
        pays = cost.rates.fetching_pays((17 * 32, 0, 0, 0), 3 * 32)
        assert bool(prefill_terms(cost, "a", 0, 1290, prefix).fetched_from) == pays


def test_late_tokens_of_a_long_prompt_cost_more():
    nothing = KnownPrefix(32, 0)
    short, long = (prefill_terms(COST, "a", 0, num_tokens, nothing).compute for num_tokens in (1000, 100_000))
    assert long > 200 * short
