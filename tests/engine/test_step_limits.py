"""What another engine's scheduler is told to schedule in a step, so that it keeps to the budgets."""

from __future__ import annotations

import math

import pytest

from services.budgets import MAX_PASSED_OVER, MIN_CHUNK, UNBOUND, Budgets
from services.engine.api import BudgetsFixed
from services.engine.foreign.step_limits import Budgeted, Running, StepLimits
from services.engine.request import Request, SamplingParams
from services.rates import RateLearner, Rates

RATES = Rates(base_s=1.0, prompt_token_s=0.01, prompt_pair_s=0.0, running_s=0.1, context_token_s=0.001, num_steps=1.0)
OWN = StepLimits(512, 0)


class Limited(Budgeted):
    """Books alone."""

    def __init__(self, budgets: Budgets = UNBOUND, *, cuts_prompts: bool = True) -> None:
        learner = RateLearner()
        learner.rates = RATES
        self.keep_budgets(learner, OWN.num_tokens, OWN.per_request, cuts_prompts)
        self.set_budgets(budgets)

    def step(self, *running: Running, num_joining: int = 0, next_start: int | None = None) -> StepLimits:
        return self.limits(running, num_joining, lambda: next_start)


def stream(num_tokens: int = 50, num_guesses: int = 0, tpot_s: float = math.inf) -> Running:
    asked = Request("s", (1, 2, 3), SamplingParams(), tpot_s=tpot_s)
    return Running(asked, num_tokens, num_tokens - 1, num_tokens - 3, num_guesses)


def prompt(num_computed: int = 0, num_tokens: int = 400) -> Running:
    return Running(Request("p", (1,) * num_tokens, SamplingParams()), num_tokens, num_computed, 0, 0)


def bounded(num_tokens: int, per_request: int = 0, *, may_begin: bool = True) -> StepLimits:
    return StepLimits(num_tokens, per_request, may_begin, is_bounded=True)


def test_without_budgets_or_streams_it_schedules_as_it_would() -> None:
    assert Limited().step(stream(), prompt(), num_joining=1) == OWN
    assert Limited(Budgets(0.0, 0)).step(prompt(), num_joining=1, next_start=0) == OWN
    last_token = prompt(num_computed=399)
    assert Limited(Budgets(0.0, 0)).step(last_token, prompt()) == OWN, "its client has no token yet"


def test_prompts_have_the_tokens_that_streams_and_their_guesses_leave() -> None:
    limited = Limited(Budgets(prompt_tokens=100))
    assert limited.step(stream(), stream(num_guesses=3), prompt(), prompt()) == bounded(1 + 4 + 100)
    assert limited.step(stream(), next_start=0) == bounded(1 + 100)
    assert limited.step(stream()) == bounded(1), "nobody waits"
    assert limited.step(*300 * [stream()], *[stream(num_guesses=1)] * 80, prompt()) == bounded(512)


def test_time_is_counted_with_guesses_and_joining_ones() -> None:
    limited = Limited(Budgets(tpot_s=2.0))
    assert limited.step(stream(100), prompt()).num_tokens == pytest.approx(1 + 80, abs=1)
    assert limited.step(stream(100, num_guesses=1), prompt()).num_tokens == pytest.approx(2 + 60, abs=1)
    assert limited.step(stream(100), num_joining=2, next_start=0).num_tokens == pytest.approx(3 + 60, abs=1)
    assert Limited().step(stream(100, tpot_s=2.0), prompt()).num_tokens == pytest.approx(1 + 80, abs=1)


def test_prompts_leave_the_tokens_of_those_that_join() -> None:
    limited = Limited(Budgets(prompt_tokens=100))
    assert limited.step(stream(), prompt(), prompt(), prompt(), num_joining=2) == bounded(103, 33, may_begin=False)
    none = Limited(Budgets(prompt_tokens=0))
    assert none.step(stream(), prompt(), prompt(), num_joining=1) == bounded(1 + 1 + 2, 1, may_begin=False)
    assert none.step(stream(), num_joining=1, next_start=0) == bounded(2, may_begin=False)


def test_prompts_that_were_left_out_get_the_smallest_chunk() -> None:
    limited, told = Limited(Budgets(prompt_tokens=0)), list[int]()
    for _ in range(MAX_PASSED_OVER + 1):
        told.append(limited.step(stream(), next_start=0).num_tokens)
        limited.prompt_budget.end(carries_prompts=told[-1] > 1)
    assert told == [*[1] * MAX_PASSED_OVER, 1 + MIN_CHUNK]
    assert limited.step(stream(), next_start=0).num_tokens == 1


def test_what_an_engine_cannot_change_is_refused_by_name() -> None:
    limited = Limited(cuts_prompts=False)
    with pytest.raises(BudgetsFixed, match="tpot_s and prompt_tokens") as refusal:
        limited.set_budgets(Budgets(1.0, 100))
    assert refusal.value.names == ("tpot_s", "prompt_tokens")
    with pytest.raises(BudgetsFixed) as refusal:
        limited.set_budgets(Budgets(prompt_tokens=100))
    assert refusal.value.names == ("prompt_tokens",)
    limited.set_budgets(UNBOUND)
    assert limited.budgets == UNBOUND
    assert limited.step(stream(tpot_s=0.0), prompt()) == OWN, "a stream's own bound is none there"
