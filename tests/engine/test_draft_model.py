"""When a draft model guesses, what it computes before, and what is learnt of it: by made-up times, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.native.speculation import TO_BE_DRAFTED, Candidate, DraftModelSpeculation, Plan
from services.engine.native.speculation.draft_model import DraftGuesses
from services.engine.native.speculation.lengths import Row, choose_lengths
from services.rates import RateLearner, Rates, StepShape

# Of a model that reads weights for 50 ms, and one of a tenth of its layers.
RATES = Rates(base_s=0.05, prompt_token_s=1e-3, prompt_pair_s=1e-9, running_s=1e-3, context_token_s=1e-9)
DRAFT = Rates(base_s=0.005, prompt_token_s=1e-4, prompt_pair_s=1e-10, running_s=1e-4, context_token_s=1e-10)


def learner(rates: Rates) -> RateLearner:
    learned = RateLearner()
    learned.rates = rates
    return learned


def make(
    rates: Rates = RATES, draft: Rates = DRAFT, num_tokens: int = 8, max_model_len: int = 10_000
) -> DraftModelSpeculation:
    return DraftModelSpeculation(num_tokens, max_model_len, 512, learner(rates), learner(draft))


@dataclass
class Text:
    """A sequence that generates, and a draft model of which so many guesses in a row come true."""

    guesses: DraftGuesses
    token_ids: list[int]
    num_true: int
    num_to_come: int = 1000
    num_said: int = 1
    tried: list[int] = field(default_factory=list)

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.token_ids, self.guesses, self.num_to_come - 1, self.num_said, self.num_to_come)


def begin(speculation: DraftModelSpeculation, num_prompt_tokens: int, num_true: int = 99) -> Text:
    return Text(speculation.new_guesses(), [7] * (num_prompt_tokens + 1), num_true)


def step(speculation: DraftModelSpeculation, texts: Sequence[Text], max_guesses: int = 512) -> Plan:
    """Plan a step, and let it come true as far as the texts say."""
    shape = StepShape(0, 0, len(texts), sum(len(text.token_ids) for text in texts))
    plan = speculation.plan([text.candidate for text in texts], max_guesses, shape)
    computed = {chunk.row: chunk for chunk in plan.chunks}
    assert len(computed) == len(plan.chunks), "two chunks of one sequence"
    for row, (text, draft) in enumerate(zip(texts, plan.drafts, strict=True)):
        assert set(draft) <= {TO_BE_DRAFTED}
        assert len(draft) < text.num_to_come
        if row in computed:
            chunk = computed[row]
            assert chunk.start == text.guesses.num_computed < chunk.end
            assert (chunk.end == len(text.token_ids)) == bool(draft), "a guess follows the newest token"
        else:
            assert not draft
        num_new = min(len(draft), text.num_true) + 1
        text.guesses.came([7] * num_new, len(draft))
        text.token_ids += [7] * num_new
        text.num_said += num_new
        text.num_to_come -= num_new
        text.tried.append(len(draft))
        assert text.guesses.num_computed < len(text.token_ids)
    return plan


# ---- how many -------------------------------------------------------------------------------

seconds = st.floats(1e-5, 1.0)
rows = st.builds(Row, st.floats(0.0, 1.0), st.integers(0, 3), st.integers(1, 10_000))
any_rates = st.builds(Rates, base_s=seconds, running_s=seconds, context_token_s=st.floats(1e-9, 1e-5))


def per_second(lengths: Sequence[int], rows: Sequence[Row], shape: StepShape, rates: Rates, draft: Rates) -> float:
    tokens = sum(1 + row.expected(length) for row, length in zip(rows, lengths, strict=True))
    context_token_s = rates.context_token_s + draft.context_token_s
    each = [rates.running_s + draft.running_s + context_token_s * row.num_context_tokens for row in rows]
    return tokens / (
        rates.step_s(shape) + max(lengths) * draft.base_s + sum(map(lambda cost, n: cost * n, each, lengths))
    )


@settings(max_examples=200)
@given(rows=st.lists(rows, min_size=1, max_size=4), rates=any_rates, draft=any_rates)
def test_no_other_lengths_are_expected_to_bring_more_tokens_a_second(
    rows: list[Row], rates: Rates, draft: Rates
) -> None:
    shape = StepShape(0, 0, len(rows), sum(row.num_context_tokens for row in rows))
    chosen = choose_lengths(rows, 100, shape, rates, draft)
    others = itertools.product(*(range(row.max_guesses + 1) for row in rows))
    best = max(per_second(lengths, rows, shape, rates, draft) for lengths in others)
    assert per_second(chosen, rows, shape, rates, draft) >= best * (1 - 1e-9)


# ---- catching up ----------------------------------------------------------------------------


def test_a_long_prompt_is_caught_up_with_in_chunks_beside_others_and_sooner_alone() -> None:
    num_steps = []
    for num_others in (0, 3):
        speculation = make()
        others = [begin(speculation, 1) for _ in range(num_others)]
        for _ in range(10):
            step(speculation, others) if others else None
        text = begin(speculation, 4000)
        text.num_said, took = 1000, 0
        while not text.tried or not text.tried[-1]:
            plan = step(speculation, [*others, text])
            assert all(text.tried[-1] for text in others), "others guess meanwhile"
            chunk = next(chunk for chunk in plan.chunks if chunk.row == len(others))
            if not plan.drafts[-1]:
                step_s = RATES.step_s(StepShape(0, 0, 1 + num_others, 0))
                assert DRAFT.prompt_s(chunk.end - chunk.start) <= (0.3 if others else 1.0) * step_s
            took += 1
        num_steps.append(took)
    assert num_steps[0] == 9, "0.4 s in eight parts of one step's time each, then guesses"
    assert 30 < num_steps[1] < 35, "in quarters of steps"


def test_a_short_answer_to_a_long_prompt_is_not_caught_up_with_and_a_long_one_is() -> None:
    for num_to_come, is_worth_it in ((20, False), (500, True)):
        speculation = make()
        text = begin(speculation, 8000)  # 0.8 s of the draft model's, some 16 steps
        text.num_to_come = num_to_come
        while text.num_to_come > 0:
            step(speculation, [text])
        assert (text.guesses.num_computed > 0) == is_worth_it
    assert len(text.tried) < 250, "long enough to win"


def test_a_short_prompt_is_guessed_for_from_the_first_step_on() -> None:
    speculation = make()
    text = begin(speculation, 5)
    step(speculation, [text])
    assert text.tried[0] > 0


def test_what_is_lost_with_its_blocks_is_computed_again() -> None:
    speculation = make()
    text = begin(speculation, 100)
    for _ in range(20):
        step(speculation, [text])
    assert text.tried[-1] > 0
    text.guesses.lose_blocks()
    plan = step(speculation, [text])
    assert [(chunk.start, len(plan.drafts[0])) for chunk in plan.chunks] == [(0, 0)]
    step(speculation, [text])
    assert text.tried[-1] > 0


# ---- what pays ------------------------------------------------------------------------------


def test_a_draft_that_is_never_right_costs_a_few_guesses_and_a_hundredth_of_the_time() -> None:
    speculation = make()
    for _ in range(3):
        text = begin(speculation, 5, num_true=0)
        for _ in range(1000):
            step(speculation, [text])
    assert 0 < sum(text.tried) < 100
    assert set(text.tried) <= {0, 1}


def test_a_draft_that_becomes_right_again_is_found_out() -> None:
    speculation = make()
    text = begin(speculation, 5, num_true=0)
    for _ in range(300):
        step(speculation, [text])
    assert sum(text.tried[-20:]) <= 2
    text.num_true, text.num_to_come = 99, 10_000
    for _ in range(400):
        step(speculation, [text])
    assert min(text.tried[-5:]) >= 4


def test_a_request_begins_with_what_those_before_it_have_taught() -> None:
    for num_true, begins in ((0, 0), (99, 6)):
        speculation = make()
        for _ in range(20):
            text = begin(speculation, 5, num_true)
            for _ in range(20):
                step(speculation, [text])
        text = begin(speculation, 5, num_true)
        step(speculation, [text])
        assert text.tried[0] >= begins if begins else text.tried[0] == 0


@pytest.mark.parametrize("slower", [1, 10])
def test_a_draft_that_is_as_slow_as_the_model_is_left_alone(slower: int) -> None:
    draft = Rates(base_s=0.05 * slower, prompt_token_s=1e-3, running_s=1e-3)
    speculation = make(draft=draft)
    text = begin(speculation, 5)
    for _ in range(200):
        step(speculation, [text])
    assert sum(text.tried) == 0


def test_a_batch_that_computes_all_the_time_is_left_alone() -> None:
    speculation = make(rates=Rates(base_s=1e-3, running_s=0.01, context_token_s=1e-9))
    texts = [begin(speculation, 5) for _ in range(16)]
    for _ in range(100):
        step(speculation, texts)
    assert sum(sum(text.tried) for text in texts) == 0


def test_limits_hold() -> None:
    speculation = make(num_tokens=3, max_model_len=50)
    text, short = begin(speculation, 30), begin(speculation, 3)
    short.num_to_come = 4
    while len(text.token_ids) < 60:
        plan = step(speculation, [text, short] if short.num_to_come > 0 else [text], max_guesses=4)
        assert sum(map(len, plan.drafts)) <= 4
        assert max(map(len, plan.drafts)) <= 3
        assert text.guesses.num_computed <= 50, "beyond the draft model's positions"
    assert max(text.tried) == 3
    assert text.tried[-1] == 0
