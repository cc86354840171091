"""A plan depends on its options alone, has the rate that was asked for, and falls into parts without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.plan import LoadOptions, OptionError, PromptMaker, make_plan

_AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.0000000,{length},{length // 4}\n"
    for second, length in ((1, 400), (2, 1600), (4, 8000))
)


@settings(max_examples=50)
@given(
    workload=st.sampled_from(["random", "azure", "mooncake", "sessions"]),
    rate=st.floats(0.1, 100),
    num_requests=st.integers(1, 60),
    warmup=st.integers(0, 5),
    num_parts=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_parts_are_the_whole_plan_and_it_has_its_rate(
    workload: str, rate: float, num_requests: int, warmup: int, num_parts: int, seed: int
) -> None:
    options = LoadOptions(
        workload=workload, rate=rate, num_requests=num_requests, warmup_requests=warmup, seed=seed, prompt_tokens=64
    )
    plan = make_plan(options, 4096)
    assert plan == make_plan(options, 4096)
    assert len(plan.requests) == num_requests + warmup
    assert [each.at_s for each in plan.requests] == sorted(each.at_s for each in plan.requests)
    assert plan.requests[-1].at_s == pytest.approx(len(plan.requests) / rate)
    assert sum(not each.is_warmup for each in plan.requests) == num_requests
    parts = [each for index in range(num_parts) for each in plan.part(index, num_parts)]
    assert sorted(parts, key=lambda each: each.index) == list(plan.requests)
    for each in plan.requests:
        total = plan.scale.prompt_tokens(each.request) + plan.scale.output_tokens(each.request)
        assert total <= 4096, "it fits the model's context"


def test_a_trace_keeps_its_proportions_at_the_rate_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(_AZURE)
    options = LoadOptions(trace=str(path), rate=2.0, num_requests=3, warmup_requests=0, scale=0.25)
    plan = make_plan(options, 4096)
    assert [each.at_s for each in plan.requests] == pytest.approx([0.0, 1 / 3, 1.0])
    assert [plan.scale.prompt_tokens(each.request) for each in plan.requests] == [100, 400, 2000]
    assert [plan.scale.output_tokens(each.request) for each in plan.requests] == [25, 100, 500]
    assert [each.kind for each in plan.requests] == ["short (≤ 512)", "medium (≤ 2,048)", "long (> 2,048)"]
    assert plan.num_cut == 0
    assert make_plan(options, 1024).num_cut == 1


def test_a_trace_with_other_arrivals_keeps_its_lengths(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(_AZURE)
    options = LoadOptions(trace=str(path), rate=2.0, num_requests=3, warmup_requests=0, arrivals="constant")
    plan = make_plan(options, 1 << 20)
    assert [each.at_s for each in plan.requests] == [0.5, 1.0, 1.5]
    assert [each.request.input_length for each in plan.requests] == [400, 1600, 8000]


def test_a_trace_that_is_too_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [1]}))
    with pytest.raises(OptionError, match=r"short.jsonl has 1 requests, the run takes 6"):
        make_plan(LoadOptions(trace=str(path), num_requests=2), 4096)


def test_lengths_that_do_not_fit_the_model_are_named() -> None:
    with pytest.raises(OptionError, match="do not fit the model's context of 100"):
        make_plan(LoadOptions(max_prompt_tokens=90, max_output_tokens=20), 100)


def test_a_turn_of_a_session_begins_with_the_turn_before_it() -> None:
    options = LoadOptions(workload="sessions", prompt_tokens=100, output_tokens=28, turns=4, rate=10, num_requests=200)
    plan = make_plan(options, 8192)
    maker = PromptMaker(plan.scale, options.token_range, options.seed)
    earlier: list[list[int]] = []
    num_later = 0
    for each in plan.requests:
        tokens = maker.tokens(each.request)
        assert len(tokens) == 100 + each.request.turn * 128 or len(tokens) > 8192 - 28 - 128
        if each.request.turn:
            num_later += 1
            whole = (100 + (each.request.turn - 1) * 128) // 32 * 32
            assert any(tokens[:whole] == before[:whole] for before in earlier)
        earlier.append(tokens)
    assert num_later / len(plan.requests) > 0.4


def test_think_times_are_seconds_at_any_rate() -> None:
    for rate in (1.0, 20.0):
        options = LoadOptions(workload="sessions", rate=rate, num_requests=300, turns=50, think_time_s=3.0)
        plan = make_plan(options, 1 << 20)
        first = next(each for each in plan.requests if each.request.turn == 1)
        assert 0.5 < first.at_s < 20


@pytest.mark.parametrize("seed", range(20))
def test_a_short_run_has_its_rate_in_the_window_that_counts(seed: int) -> None:
    """Warm-up takes its share of the time, not more and not less: twelve requests at 5/s come in about 2.4 s."""
    plan = make_plan(LoadOptions(rate=5.0, num_requests=12, warmup_requests=4, seed=seed), None)
    assert plan.requests[3].at_s == pytest.approx(4 / 5)
    assert plan.requests[-1].at_s == pytest.approx(16 / 5)
    assert plan.measured_s == pytest.approx(12 / 5)
