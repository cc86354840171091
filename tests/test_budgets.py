"""What a step may carry beside running streams: as much as both budgets allow, and nothing where that is too little."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.budgets import (
    MIN_CHUNK,
    UNBOUND,
    UNLIMITED,
    Budgets,
    Objectives,
    budgets_of,
    prompt_beside_s,
    prompt_pace,
    prompt_room,
)
from services.rates import NO_STEP, Rates, StepShape

ONE_STREAM = StepShape(num_running=1, num_context_tokens=100)
RATES = Rates(base_s=0.005, prompt_token_s=0.002, prompt_pair_s=1e-7, running_s=0.001, context_token_s=1e-7)

seconds = st.floats(1e-4, 10)


@given(
    tpot_s=seconds,
    prompt_tokens=st.integers(0, 4096),
    start=st.integers(0, 100_000),
    num_running=st.integers(1, 64),
    token_s=st.floats(1e-6, 0.01),
    pair_s=st.floats(0, 1e-5),
)
def test_a_step_keeps_to_both_budgets_and_uses_them(
    tpot_s: float, prompt_tokens: int, start: int, num_running: int, token_s: float, pair_s: float
) -> None:
    rates = Rates(prompt_token_s=token_s, prompt_pair_s=pair_s)
    running = StepShape(num_running=num_running, num_context_tokens=num_running * 50)

    def step_s(num_tokens: int) -> float:
        return rates.step_s(running) + rates.prompt_s(num_tokens, start)

    room = prompt_room(Budgets(tpot_s, prompt_tokens), rates, running, start)

    assert room == 0 or MIN_CHUNK <= room <= prompt_tokens
    if room:
        assert step_s(room) <= tpot_s * (1 + 1e-9)
    more = max(room + 1, MIN_CHUNK)
    assert more > prompt_tokens or step_s(more) > tpot_s * (1 - 1e-9)


@given(tpot_s=seconds, prompt_tokens=st.integers(0, 4096), num_running=st.integers(1, 64))
def test_the_pace_is_the_room_or_what_is_saved_for_a_chunk(tpot_s: float, prompt_tokens: int, num_running: int) -> None:
    budgets, running = Budgets(tpot_s, prompt_tokens), StepShape(num_running=num_running)
    room, pace = prompt_room(budgets, RATES, running, 0), prompt_pace(budgets, RATES, running, 0)

    assert room == (pace if pace >= MIN_CHUNK else 0)
    assert pace == 0 or RATES.step_s(running) + RATES.prompt_s(pace) <= tpot_s * (1 + 1e-9)


def test_a_step_without_streams_is_bounded_by_neither() -> None:
    assert prompt_room(Budgets(1e-6, 0), RATES, NO_STEP, 0) == UNLIMITED


def test_without_budgets_there_is_no_bound() -> None:
    assert prompt_room(UNBOUND, RATES, ONE_STREAM, 0) == UNLIMITED


def test_a_decode_worker_spends_less_of_the_objective_than_a_prefill_worker_and_carries_less() -> None:
    objectives = Objectives(ttft_s=1.5, tpot_s=0.08)
    prefill, decode = budgets_of("prefill", objectives), budgets_of("decode", objectives)

    assert prefill == Budgets(0.08, UNLIMITED)
    assert decode.tpot_s < prefill.tpot_s
    assert decode.prompt_tokens < prefill.prompt_tokens


def test_without_objectives_no_role_bounds_time() -> None:
    assert math.isinf(budgets_of("decode", Objectives()).tpot_s)


def test_a_prompt_beside_streams_takes_the_steps_that_the_budget_cuts_it_into() -> None:
    # 80 ms less a step of 6 ms leaves room for 36 tokens of 2 ms: 15 steps for 512.
    budgets = Budgets(tpot_s=0.08)
    room = prompt_room(budgets, RATES, ONE_STREAM, 256)
    taken_s = prompt_beside_s(budgets, RATES, 512, 0, ONE_STREAM, 512)

    assert taken_s == pytest.approx(-(-512 // room) * RATES.step_s(ONE_STREAM) + RATES.prompt_s(512))
    assert prompt_beside_s(budgets, RATES, 512, 0, NO_STEP, 512) < taken_s


def test_nobody_counts_on_a_worker_whose_streams_take_all_their_time() -> None:
    assert math.isinf(prompt_beside_s(Budgets(tpot_s=0.005), RATES, 512, 0, ONE_STREAM, 512))
