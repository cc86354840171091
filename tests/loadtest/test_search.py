"""The highest rate that a target keeps up with is found in few runs, from wherever the search begins."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.plan import objectives_from
from loadtest.send.search import RateSearch, place_below, rate_at
from tests.loadtest.factories import RECORD, records


@given(st.integers(-30, 40))
def test_rates_ascend_by_about_a_fifth(place: int) -> None:
    assert 1.14 < rate_at(place + 1) / rate_at(place) < 1.26
    assert place_below(rate_at(place)) == place


@given(st.floats(0.05, 500), st.floats(-2.5, 4))
def test_the_search_ends_at_the_last_rate_that_is_kept(capacity: float, octaves: float) -> None:
    search = RateSearch(capacity / 2**octaves)
    tried = []
    while (rate := search.next_rate) is not None:
        tried.append(rate)
        search.take(rate <= capacity)
    assert search.found == rate_at(place_below(capacity))
    assert len(tried) == len(set(tried)), "no rate is tried twice"
    assert len(tried) <= 5 + abs(octaves)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_search_without_an_end_gives_up(is_kept: bool) -> None:
    search = RateSearch(1.0)
    for _ in range(20):
        if search.next_rate is None:
            break
        search.take(is_kept)
    assert search.next_rate is None
    assert (search.found is not None) is is_kept


def test_objectives_are_five_times_what_a_lone_request_takes_rounded_up() -> None:
    assert objectives_from(records(5, 1.0, ttft_s=0.081, gap_s=0.0093)) == "ttft:500,itl:50"
    assert objectives_from([RECORD, *records(4, 1.0, ttft_s=0.012, gap_s=0.0011)]) == "ttft:70,itl:7"


def test_answers_of_one_token_set_no_objective_for_gaps() -> None:
    assert objectives_from([replace(RECORD, gaps_s=(), num_output_tokens=1)]) == "ttft:3000"


def test_lone_requests_without_an_answer_set_no_objective() -> None:
    with pytest.raises(ValueError, match="no request was sent"):
        objectives_from([])
