"""A verdict is true, or there is none and the page says why: noise, a busy machine, late sends, nobody healthy."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.figures import Level, MachineUse, RunResult, Verdict, cases, compare, doubts_of, judge, noise
from loadtest.plan import Outcome, RequestRecord
from tests.loadtest.factories import records, result, some_good


def runs(rate: float = 10.0, number: int = 40, **good: float) -> list[RunResult]:
    """One run per target, with this share of good requests."""
    return [result(target, rate, some_good(number, rate, share)) for target, share in good.items()]


def verdict(*results: RunResult) -> Verdict:
    return judge(cases(results))


def test_who_keeps_up_with_a_higher_rate_wins_and_the_factor_lies_between_the_rates_tried() -> None:
    found = verdict(*runs(10, fast=1, slow=1), *runs(20, fast=1, slow=0.5), *runs(40, fast=0.4, slow=0.1))
    assert (found.level, found.winner) == (Level.CLEAR, "fast")
    assert (found.factor, found.factor_low, found.factor_high) == (2.0, 1.0, 4.0)
    assert "fast is better: it kept 90 % of its requests good up to 20 requests/s (not at 40)" in found.sentence
    assert "slow up to 10 (not at 20): 2.0 times" in found.sentence
    assert [(each.target, each.healthy_rate, each.next_rate) for each in found.standings] == [
        ("fast", 20.0, 40.0), ("slow", 10.0, 20.0),
    ]  # fmt: skip


def test_one_healthy_target_wins_over_one_that_never_was_and_there_is_no_factor() -> None:
    found = verdict(*runs(10, fast=1, slow=0.2))
    assert (found.level, found.winner, found.factor) == (Level.CLEAR, "fast", None)
    assert "slow at no rate (not at 10)" in found.sentence


def test_nobody_healthy_is_no_verdict_however_far_one_is_ahead() -> None:
    found = verdict(*runs(10, better=0.89, worse=0.1))
    assert (found.level, found.winner) == (Level.NONE, None)
    assert "nobody kept 90 %" in found.sentence
    assert "better at 10/s, with 88 %" in found.sentence
    assert all(each.goodput is None for each in found.standings), "below 90 % good there is no best"


def test_targets_that_answer_nothing_get_no_verdict() -> None:
    dead = [replace(each, outcome=Outcome.ERROR) for each in records(40, 10.0, 0.1)]
    assert verdict(result("a", 10.0, dead), result("b", 10.0, dead)).sentence == (
        "No verdict: no target answered any request."
    )


def test_a_difference_within_the_noise_is_no_verdict() -> None:
    """91 % against 89 %: one is above the line and the other below it, and that means nothing."""
    rng = random.Random(3)
    made = [
        result(target, 10.0, sorted(shuffled(100, share, rng), key=lambda each: each.index))
        for target, share in (("over", 0.92), ("under", 0.88))
    ]
    found = verdict(*made)
    assert (found.level, found.winner) == (Level.NONE, None)
    assert "within the noise" in found.sentence
    assert "92 % against 88 % were good" in found.sentence


def shuffled(number: int, good: float, rng: random.Random) -> list[RequestRecord]:
    made = some_good(number, 10.0, good)
    order = list(range(number))
    rng.shuffle(order)
    moved = []
    for each, index in zip(made, order, strict=True):
        shift_s = (index - each.index) / 10.0
        times = {
            name: getattr(each, name) + shift_s for name in ("scheduled_s", "sent_s", "first_token_s", "finished_s")
        }
        moved.append(replace(each, index=index, **times))
    return moved


def test_an_order_that_turns_round_where_there_are_enough_requests_is_no_verdict() -> None:
    few = [result("lucky", 10.0, some_good(8, 10.0, 1)), result("steady", 10.0, some_good(8, 10.0, 0.5))]
    found = verdict(*few, *runs(20, lucky=0.1, steady=0.6))
    assert (found.level, found.winner) == (Level.NONE, None)
    assert "the other way round: at 20/s 10 % against 60 % were good" in found.sentence


def test_too_few_requests_are_no_verdict() -> None:
    found = verdict(*runs(10, number=16, fast=1, slow=0.2))
    assert (found.level, found.winner) == (Level.NONE, None)
    assert "at least 20" in found.sentence


def test_targets_that_got_different_requests_are_not_compared() -> None:
    fast, slow = runs(10, fast=1, slow=0.2)
    assert verdict(replace(fast, turn=2), slow).level is Level.NONE


def test_both_healthy_everywhere_is_a_tie_that_asks_for_higher_rates() -> None:
    found = verdict(result("one", 10.0, records(40, 10.0, 0.3)), result("two", 10.0, records(40, 10.0, 0.1)))
    assert (found.level, found.winner) == (Level.TIE, None)
    assert "higher rates would tell more" in found.sentence
    assert "time to first token (p90) 100 ms on two, 300 ms on one (3.00 times" in found.sentence


def test_a_rate_above_one_that_was_too_much_counts_for_nothing() -> None:
    found = verdict(*runs(10, a=1), *runs(20, a=0.5), *runs(30, a=1))
    assert found.standings[0].healthy_rate == 10.0


def busy(run: RunResult, others: float) -> RunResult:
    return replace(run, machine_use=MachineUse(num_processors=2, ours=1.0, others=others))


@pytest.mark.parametrize(
    ("others", "level"), [(0.08, Level.CLEAR), (0.12, Level.DOUBTFUL), (0.48, Level.DOUBTFUL), (0.52, Level.NONE)]
)
def test_a_busy_machine_weakens_a_verdict_and_a_very_busy_one_voids_it(others: float, level: Level) -> None:
    fast, slow = runs(10, fast=1, slow=0.2)
    found = verdict(fast, busy(slow, others))
    assert found.level is level
    assert (found.winner is None) is (level is Level.NONE)
    if level is Level.DOUBTFUL:
        assert f"machine busy (slow at 10/s: others used {others / 2:.0%} of the processors)" in found.reservation
    if level is Level.NONE:
        assert found.sentence.startswith("No verdict: machine busy")


def late(run: RunResult, number: int) -> RunResult:
    made = [replace(each, sent_s=each.scheduled_s + 0.1) if each.index < number else each for each in run.records]
    return replace(run, records=tuple(made))


@pytest.mark.parametrize(("number", "level"), [(0, Level.CLEAR), (1, Level.DOUBTFUL), (4, Level.NONE)])
def test_late_sends_weaken_a_verdict_and_many_void_it(number: int, level: Level) -> None:
    fast, slow = runs(10, fast=1, slow=0.2)
    found = verdict(late(fast, number), slow)
    assert found.level is level
    assert ("sent late" in found.reservation + found.sentence) is (number > 0)


def test_doubts_about_runs_that_decide_nothing_do_not_weaken_the_verdict() -> None:
    overloaded = [late(busy(run, 1.9), 30) for run in runs(40, fast=0.1, slow=0.1)]
    found = verdict(*runs(10, fast=1, slow=1), *runs(20, fast=1, slow=0.2), *overloaded)
    assert (found.level, found.winner) == (Level.CLEAR, "fast")
    assert {doubt.short for case in cases(overloaded) for doubt in doubts_of(case)} == {"machine busy", "sent late"}


def test_nobody_healthy_on_a_busy_machine_says_both() -> None:
    found = verdict(*(busy(run, 0.4) for run in runs(10, a=0.5, b=0.2)))
    assert found.level is Level.NONE
    assert "nobody kept 90 %" in found.sentence
    assert "others used 20%" in found.reservation


def test_a_very_busy_machine_is_the_reason_whatever_else_there_is() -> None:
    """Noise, a tie, nobody healthy: on such a machine none of them was found out."""
    for shares in ({"a": 0.5, "b": 0.2}, {"a": 1, "b": 1}, {"a": 0.92, "b": 0.88}):
        found = verdict(*(busy(run, 1.0) for run in runs(10, **shares)))
        assert found.level is Level.NONE
        assert found.sentence.startswith("No verdict: machine busy")
        assert "Measure again on a quiet machine" in found.sentence


def test_rounds_are_taken_together_and_searches_left_out() -> None:
    first, second = runs(10, a=1), runs(10, a=0.5)
    search = [replace(runs(10, number=20, a=0)[0], turn=0)]
    (case,) = cases([*search, *first, replace(second[0], turn=2)])
    assert [run.turn for run in case.runs] == [1, 2]
    assert (case.summary.num_requests, case.summary.good) == (80, 0.75)
    assert [each.good for each in case.stretches] == [1.0] * 4 + [0.5] * 4
    assert case.summary.goodput == pytest.approx(7.5)
    (alone,) = cases(search)
    assert alone.is_probe


def test_rounds_one_after_the_other_do_not_overlap() -> None:
    """Token rates are over both runs' time, and no warm-up or waiting between them."""
    one = runs(10, a=1)[0]
    (both,) = cases([one, replace(one, turn=2)])
    (alone,) = cases([one])
    assert both.summary.duration_s == pytest.approx(2 * alone.summary.duration_s, rel=0.01)
    assert both.summary.output_token_rate == pytest.approx(alone.summary.output_token_rate, rel=0.01)


def test_answers_of_one_token_have_no_tpot_and_compare_by_what_they_have() -> None:
    short = [replace(each, num_output_tokens=1, gaps_s=()) for each in records(40, 10.0, 0.2)]
    slow = [replace(each, num_output_tokens=1, gaps_s=()) for each in records(40, 10.0, 0.9)]
    made = cases([result("a", 10.0, short), result("b", 10.0, slow)])
    assert made[0].summary.tpot.p90 is made[0].summary.request_itl.p90 is None
    assert compare("TPOT", lambda each: each.tpot.p90, made) == ""
    assert "a request's 99th percentile" not in judge(made).sentence
    assert "time to first token (p90) 200 ms on a, 900 ms on b" in judge(made).sentence


def test_a_comparison_of_equals_says_nothing() -> None:
    made = cases([result("a", 10.0, records(40, 10.0, 0.2)), result("b", 10.0, records(40, 10.0, 0.205))])
    assert compare("TTFT", lambda each: each.ttft.p90, made) == ""
    assert compare("TTFT", lambda each: each.ttft.p90, made[:1]) == ""


@given(st.integers(0, 1000))
def test_a_paired_difference_sees_through_what_both_suffer(seed: int) -> None:
    rng = random.Random(seed)
    shared = [rng.uniform(0, 100) for _ in range(8)]
    found = noise.difference([each + 1 for each in shared], shared)
    assert found is not None
    assert not found.has(0.0)
    assert noise.mean_of(shared[:3]) is None, "three figures say nothing of their scatter"


def test_two_equal_targets_seldom_differ() -> None:
    """The interval holds what it promises: of 400 pairs without a difference about 5 % look like one."""
    rng = random.Random(0)
    num_wrong = 0
    for _ in range(400):
        left, right = ([rng.gauss(0, 1) for _ in range(8)] for _ in range(2))
        found = noise.difference(left, right)
        assert found is not None
        num_wrong += not found.has(0.0)
    assert 8 <= num_wrong <= 34


def test_equal_targets_seldom_get_a_winner() -> None:
    """Both have nine good requests in ten, by chance: often one is above the line and the other below, and that is no
    verdict but in a few of a hundred."""
    rng = random.Random(1)
    num_winners = num_apart = 0
    for _ in range(100):
        found = verdict(*(result(target, 10.0, by_chance(80, 0.9, rng)) for target in ("one", "two")))
        num_winners += found.winner is not None
        num_apart += len({each.healthy_rate for each in found.standings}) == 2
    assert num_apart > 30
    assert num_winners <= 5


def test_different_targets_mostly_get_one() -> None:
    rng = random.Random(2)
    found = [
        verdict(result("good", 10.0, by_chance(80, 0.97, rng)), result("bad", 10.0, by_chance(80, 0.6, rng))).winner
        for _ in range(50)
    ]
    assert found.count("good") >= 45
    assert found.count("bad") == 0


def by_chance(number: int, good: float, rng: random.Random) -> list[RequestRecord]:
    return [
        each if rng.random() < good else replace(each, first_token_s=each.scheduled_s + 3)
        for each in records(number, 10.0, ttft_s=0.2)
    ]
