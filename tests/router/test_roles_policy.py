"""The policy of roles: what it changes, for what reason, and what it never does."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.budgets import Budgets, Objectives, budgets_of
from services.rates import GUESSED, Rates
from services.router.roles import (
    LADDER,
    Attainment,
    ControllerState,
    Demand,
    FleetView,
    Settings,
    Verdict,
    WorkerView,
    decide,
)
from tests.router.fluid_fleet import OBJECTIVES, Arrivals, FluidFleet, run_course, worker

SETTINGS = Settings(window_s=30, hold_s=10, dwell_s=60)
PROMPTS = Arrivals(4, 2500, 60)
"""Takes three workers for prompts and one for streams..."""
STREAMS = Arrivals(9, 150, 600)
"""... and that the other way round."""
MANY_PROMPTS = Demand(4.0, 2500.0, 0.0, 60.0)
MANY_STREAMS = Demand(12.0, 150.0, 0.0, 600.0)
IDLE = ControllerState(no_flip_until_s=0.0)
"""Whoever has this has waited out its first dwell time."""


def fleet(roles: str = "pddd", **changes: object) -> FleetView:
    """Workers by a letter each (p or d; fixed P or D), at a moment when nothing is amiss."""
    names = {"p": "prefill", "d": "decode"}
    workers = tuple(
        worker(f"w{number}", names[letter.lower()], is_fixed=letter.isupper())  # type: ignore[arg-type]
        for number, letter in enumerate(roles)
    )
    view = FleetView(100.0, "m", workers, Attainment(40, 40, 40, 0.5, 0.5), Demand(1.0, 500.0, 0.0, 60.0), 0.0, 0.01)
    return replace(view, **changes)  # type: ignore[arg-type]


def short_of_prefill(roles: str = "pddd", **changes: object) -> FleetView:
    view = fleet(roles, demand=MANY_PROMPTS, prefill_wait_s=4.0, attainment=Attainment(40, 5, 40, 3.0, 0.4))
    return replace(view, **changes)  # type: ignore[arg-type]


def short_of_decode(roles: str = "pppd", **changes: object) -> FleetView:
    view = fleet(roles, demand=MANY_STREAMS, step_s=0.06, attainment=Attainment(40, 40, 5, 0.4, 1.6))
    return replace(view, **changes)  # type: ignore[arg-type]


def held(view: FleetView, state: ControllerState = IDLE, seconds: int = 40) -> list[Verdict]:
    """What is decided while the same is measured, a second apart; nobody does what is said."""
    verdicts = []
    for second in range(seconds):
        state, verdict = decide(replace(view, at_s=view.at_s + second), state, OBJECTIVES, SETTINGS)
        verdicts.append(verdict)
    return verdicts


def changes(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.kind != "none"]


def first_change(view: FleetView, state: ControllerState = IDLE) -> Verdict:
    return changes(held(view, state))[0]


# ---- what is changed, and why ------------------------------------------------


def test_ladder_begins_where_the_role_does() -> None:
    share, prompt_tokens = LADDER[1]
    assert Budgets(share * OBJECTIVES.tpot_s, prompt_tokens) == budgets_of("decode", OBJECTIVES)


def test_missed_ttft_beside_idle_streams_flips_a_decode_worker() -> None:
    verdict = first_change(short_of_prefill())
    assert verdict.kind == "flip"
    (change,) = verdict.changes
    assert (change.worker_id, change.role) == ("w1", "prefill")
    assert change.budgets == budgets_of("prefill", OBJECTIVES)


def test_missed_tpot_beside_idle_prefill_workers_flips_one_of_them() -> None:
    verdict = first_change(short_of_decode())
    assert verdict.kind == "flip"
    (change,) = verdict.changes
    assert (change.worker_id, change.role) == ("w0", "decode")
    assert change.budgets == budgets_of("decode", OBJECTIVES)


def test_tpot_missed_by_prompts_beside_few_streams_is_a_shortage_of_prefill() -> None:
    """Answers of three tokens: whoever waits for a prompt in between misses. Steps with streams alone are short."""
    demand = Demand(6.0, 2500.0, 0.0, 3.0)
    view = fleet("pddd", demand=demand, step_s=0.012, attainment=Attainment(40, 40, 30, 0.5, 1.9))
    verdict = first_change(view)
    assert verdict.kind == "flip"
    assert verdict.changes[0].role == "prefill"


@pytest.mark.parametrize("field", ["num_running", "kv_usage"])
def test_full_seats_or_blocks_are_a_shortage_of_decode_though_first_tokens_are_late(field: str) -> None:
    view = short_of_decode(step_s=0.02, attainment=Attainment(40, 5, 40, 2.0, 0.5), prefill_wait_s=3.0)
    full = 64 if field == "num_running" else 1.0
    workers = tuple(
        replace(each, **{"num_running": 9, field: full}) if each.role == "decode" else each for each in view.workers
    )
    assert first_change(replace(view, workers=workers)).kind == "flip"


def test_the_worker_that_flips_is_the_one_with_the_least_to_bend() -> None:
    loads = {"w1": (900, 3), "w2": (100, 9), "w3": (500, 1)}
    workers = tuple(
        replace(each, num_context_tokens=loads[each.worker_id][0], num_running=loads[each.worker_id][1])
        if each.worker_id in loads
        else each
        for each in fleet().workers
    )
    assert first_change(short_of_prefill(workers=workers)).changes[0].worker_id == "w2"


def test_budgets_move_where_they_are_predicted_to_do() -> None:
    slightly = Demand(1.9, 2500.0, 0.0, 60.0)
    verdict = first_change(short_of_prefill("pddd", demand=slightly, prefill_wait_s=0.8))
    assert verdict.kind == "budgets"
    assert {change.worker_id for change in verdict.changes} == {"w1", "w2", "w3"}
    assert {change.role for change in verdict.changes} == {"decode"}
    assert {change.budgets.prompt_tokens for change in verdict.changes} == {LADDER[2][1]}


def test_prompts_beside_streams_are_fewer_where_only_they_make_tokens_late() -> None:
    late = Attainment(40, 40, 5, 0.4, 1.2)
    verdict = first_change(fleet("ppdd", attainment=late))
    assert verdict.kind == "budgets"
    assert {change.budgets.prompt_tokens for change in verdict.changes} == {LADDER[0][1]}


def test_a_role_that_nobody_has_is_filled() -> None:
    verdict = first_change(fleet("dddd"))
    assert (verdict.kind, verdict.changes[0].role) == ("flip", "prefill")


def test_workers_are_told_the_budgets_of_their_role_when_they_have_others() -> None:
    view = fleet("ppdd")
    stranger = replace(view.workers[3], budgets=Budgets())
    fixed = replace(view.workers[2], budgets=Budgets(), is_fixed=True)
    _, verdict = decide(replace(view, workers=(*view.workers[:2], fixed, stranger)), IDLE, OBJECTIVES, SETTINGS)
    assert [(each.worker_id, each.role, each.budgets) for each in verdict.changes] == [
        ("w3", "decode", budgets_of("decode", OBJECTIVES))
    ]


def test_a_shortage_has_to_last() -> None:
    view, calm = short_of_prefill(), fleet()
    state, kinds = IDLE, []
    for second in range(60):
        seen = calm if second % 9 == 8 else view
        state, verdict = decide(replace(seen, at_s=100.0 + second), state, OBJECTIVES, SETTINGS)
        kinds.append(verdict.kind)
    assert set(kinds) == {"none"}


def test_it_is_easier_to_stay_short_than_to_become_so() -> None:
    def prefill_pressure_of(ratio: float, state: ControllerState) -> ControllerState:
        view = short_of_prefill(prefill_wait_s=0.0, attainment=Attainment(40, 5, 40, ratio, 0.4))
        return decide(replace(view, at_s=state.at_s + 1), state, OBJECTIVES, SETTINGS)[0]

    begun = replace(IDLE, at_s=0.0)
    assert prefill_pressure_of(0.9, begun).short is None
    short = prefill_pressure_of(1.1, begun)
    assert short.short == "prefill"
    assert prefill_pressure_of(0.9, short).short == "prefill"
    assert prefill_pressure_of(0.7, short).short is None


# ---- what is not changed -----------------------------------------------------


def test_nothing_is_changed_where_both_sides_are_short() -> None:
    view = short_of_prefill(step_s=0.06)
    assert not changes(held(view))
    assert "no room" in held(view)[-1].reason


def test_nothing_is_flipped_that_would_make_the_other_side_miss() -> None:
    busy = Demand(12.0, 2500.0, 0.0, 600.0)
    verdicts = held(short_of_prefill("ppdd", demand=busy))
    assert not [verdict for verdict in verdicts if verdict.kind == "flip"]
    assert verdicts[-1].gate is not None
    assert verdicts[-1].gate.measurement == "predicted decode after the flip"


def test_nothing_is_flipped_where_a_prompt_alone_takes_too_long() -> None:
    long = Demand(0.1, 9000.0, 0.0, 60.0)
    view = short_of_prefill("ppdd", demand=long, prefill_wait_s=0.0, attainment=Attainment(9, 0, 9, 2.0, 0.4))
    assert not [verdict for verdict in held(view) if verdict.kind == "flip"]


@pytest.mark.parametrize("short", ["prefill", "decode"])
def test_nothing_is_flipped_for_a_side_that_has_little_to_do(short: str) -> None:
    little = Demand(1.0, 500.0, 0.0, 60.0)
    attained = Attainment(40, 5, 40, 3.0, 0.4) if short == "prefill" else Attainment(40, 40, 5, 0.4, 3.0)
    share, tokens = LADDER[2 if short == "prefill" else 0]  # budgets have done what they can
    workers = tuple(
        replace(each, budgets=Budgets(share * OBJECTIVES.tpot_s, tokens)) if each.role == "decode" else each
        for each in fleet("ppdd").workers
    )
    verdicts = held(fleet("ppdd", workers=workers, demand=little, attainment=attained))
    assert not [verdict for verdict in verdicts if verdict.kind == "flip"]
    assert verdicts[-1].gate is not None
    assert verdicts[-1].gate.measurement == f"load of {short}"


def test_a_fleet_without_objectives_is_left_alone() -> None:
    _, verdict = decide(short_of_prefill(), IDLE, Objectives(), SETTINGS)
    assert (verdict.kind, verdict.reason) == ("none", "no objectives")


def test_the_first_decision_waits_out_a_dwell_time() -> None:
    verdicts = held(short_of_prefill(), ControllerState(), seconds=90)
    first = next(number for number, verdict in enumerate(verdicts) if verdict.kind == "flip")
    assert first == SETTINGS.dwell_s


def wrong_views() -> list[tuple[str, FleetView]]:
    def with_worker(**fields: object) -> FleetView:
        view = short_of_prefill()
        first = replace(view.workers[0], **fields)  # type: ignore[arg-type]
        return replace(view, workers=(first, *view.workers[1:]))

    unlearnt = tuple(replace(each, rates=GUESSED) for each in fleet().workers)
    return [
        ("demand is missing", short_of_prefill(demand=None)),
        ("demand: requests_per_s", short_of_prefill(demand=replace(MANY_PROMPTS, requests_per_s=math.nan))),
        ("demand: prompt_tokens", short_of_prefill(demand=replace(MANY_PROMPTS, prompt_tokens=-1.0))),
        ("prefill_wait_s", short_of_prefill(prefill_wait_s=math.inf)),
        ("step_s", short_of_prefill(step_s=-0.1)),
        ("at_s", short_of_prefill(at_s=math.nan)),
        ("ttft_ratio", short_of_prefill(attainment=Attainment(40, 5, 40, math.nan, 0.4))),
        ("41 of 40", short_of_prefill(attainment=Attainment(40, 41, 40, 3.0, 0.4))),
        ("last word is 9 s old", with_worker(age_s=9.0)),
        ("num_waiting_tokens", with_worker(num_waiting_tokens=-5)),
        ("num_running is 65", with_worker(num_running=65)),
        ("of no running request", with_worker(num_context_tokens=10)),
        ("kv_usage", with_worker(kv_usage=1.5)),
        ("room for 0", with_worker(max_running=0)),
        ("budgets of", with_worker(budgets=Budgets(0.0, 5))),
        ("role is", with_worker(role="store")),
        ("rates of prompts", with_worker(rates=Rates(prompt_token_s=math.inf, num_steps=5))),
        ("rates of streams", with_worker(rates=Rates(running_s=math.nan, num_steps=5))),
        ("names", with_worker(worker_id="w1")),
        ("learnt", short_of_prefill(workers=unlearnt)),
    ]


@pytest.mark.parametrize(("wrong", "view"), wrong_views(), ids=[wrong for wrong, _ in wrong_views()])
def test_a_wrong_measurement_decides_nothing_and_is_named(wrong: str, view: FleetView) -> None:
    verdicts = held(view)
    assert not changes(verdicts)
    assert wrong in verdicts[-1].reason


def test_a_clock_that_goes_back_decides_nothing() -> None:
    _, verdict = decide(short_of_prefill(at_s=5.0), replace(IDLE, at_s=50.0), OBJECTIVES, SETTINGS)
    assert "went back" in verdict.reason


def test_a_wrong_measurement_ends_a_shortage() -> None:
    view, state = short_of_prefill(), IDLE
    for second in range(9):
        state, _ = decide(replace(view, at_s=100.0 + second), state, OBJECTIVES, SETTINGS)
    assert state.short == "prefill"
    state, _ = decide(replace(view, at_s=109.0, demand=None), state, OBJECTIVES, SETTINGS)
    assert state.short is None


@pytest.mark.parametrize("roles", ["pd", "pDDD", "Pd", "ppp", "d", ""])
def test_fixed_workers_and_the_last_of_a_role_stay(roles: str) -> None:
    for view in (short_of_prefill(roles), short_of_decode(roles)):
        for verdict in held(view):
            for change in verdict.changes if verdict.kind == "flip" else ():
                before = {each.worker_id: each for each in view.workers}[change.worker_id]
                assert not before.is_fixed
                assert len(view.ready(before.role)) > 1


# ---- one flip at a time ------------------------------------------------------


def test_a_flip_that_is_not_taken_is_sent_again_and_then_given_up() -> None:
    verdicts = held(short_of_prefill(), seconds=60)
    flip = next(number for number, verdict in enumerate(verdicts) if verdict.kind == "flip")
    after = [verdict.kind for verdict in verdicts[flip : flip + 12]]
    assert after == [
        "flip",
        "none",
        "again",
        "none",
        "again",
        "none",
        "again",
        "none",
        "again",
        "none",
        "again",
        "none",
    ]
    assert {each.changes for each in verdicts if each.kind == "again"} == {verdicts[flip].changes}
    assert not [verdict for verdict in verdicts[flip + 12 :] if verdict.kind in ("flip", "again")]


def test_no_second_flip_before_the_worker_has_said_its_role_and_a_window_has_passed() -> None:
    slow = Settings(window_s=100, hold_s=1, dwell_s=10)
    view, state, flips = short_of_prefill(), IDLE, []
    for second in range(300):
        state, verdict = decide(replace(view, at_s=100.0 + second), state, OBJECTIVES, slow)
        if verdict.kind == "flip":
            flips.append(second)
        if flips and second == flips[0] + 5:
            taken = tuple(replace(w, role="prefill") if w.worker_id == "w1" else w for w in view.workers)
            view = replace(view, workers=taken)
    assert len(flips) > 1
    assert flips[1] - flips[0] >= 5 + 100


def test_a_restarted_worker_is_not_sent_its_predecessor_s_flip() -> None:
    view, state = short_of_prefill(), IDLE
    kinds = []
    for second in range(30):
        state, verdict = decide(replace(view, at_s=100.0 + second), state, OBJECTIVES, SETTINGS)
        kinds.append(verdict.kind)
        if verdict.kind == "flip":
            again = tuple(replace(w, incarnation="i2") if w.worker_id == "w1" else w for w in view.workers)
            view = replace(view, workers=again)
    assert kinds.count("flip") == 1
    assert "again" not in kinds


# ---- explanations ------------------------------------------------------------


def test_every_verdict_has_its_inputs_and_what_would_have_changed_it() -> None:
    for view in (fleet(), short_of_prefill(), short_of_decode(), short_of_prefill(step_s=0.06), fleet("dddd")):
        for verdict in held(view):
            assert verdict.counterfactual
            assert verdict.gate is not None
            assert f"{verdict.gate.bound:.4g}" in verdict.counterfactual
            assert {"prefill_wait_s", "step_s", "predicted_prefill", "requests_per_s"} <= set(verdict.inputs)
            json.dumps(verdict.inputs, allow_nan=False)
            if verdict.kind == "none" and "has not said" not in verdict.reason:
                assert not verdict.gate.passes


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_measurement_that_is_named_changes_the_verdict(factor: float) -> None:
    view = fleet("pddd", demand=MANY_PROMPTS, attainment=Attainment(40, 40, 40, 0.8, 0.4), prefill_wait_s=0.1)
    gate = held(view)[-1].gate
    assert gate is not None
    assert (gate.measurement, gate.bound) == ("prefill_pressure", 1.0)
    moved = replace(view, attainment=Attainment(40, 20, 40, gate.bound * factor, 0.4))
    assert bool(changes(held(moved))) == (factor > 1)


# ---- courses: closed loops with a fleet --------------------------------------


def count_flips(roles: str, loads: list[Arrivals], noise: float = 0.0, seed: int = 0) -> int:
    return len(run_course(FluidFleet(roles, noise, seed), loads, SETTINGS).fleet.flips)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_constant_load_ends_in_the_split_that_bears_it(noise: float, seed: int) -> None:
    prompts = run_course(FluidFleet("pddd", noise, seed), [PROMPTS] * 400, SETTINGS)
    assert (prompts.fleet.count("prefill"), len(prompts.fleet.flips)) == (3, 2)
    streams = run_course(FluidFleet("pppd", noise, seed), [STREAMS] * 400, SETTINGS)
    assert (streams.fleet.count("decode"), len(streams.fleet.flips)) == (3, 2)


def test_a_step_of_the_load_is_followed_and_no_more() -> None:
    loads = [PROMPTS] * 400 + [STREAMS] * 400 + [PROMPTS] * 400
    assert count_flips("pppd", loads) == 4
    assert count_flips("pppd", loads, noise=0.15) <= 6


def test_led_by_the_policy_a_shifting_load_is_borne_better_than_by_any_fixed_split() -> None:
    loads = [PROMPTS] * 500 + [STREAMS] * 500
    led = run_course(FluidFleet("pppd"), loads, SETTINGS).good_seconds()
    fixed = [run_course(FluidFleet(roles), loads, SETTINGS, moves=False).good_seconds() for roles in SPLITS]
    assert led > max(fixed) + 0.1


SPLITS = ("pddd", "ppdd", "pppd")


def test_a_ramp_is_followed_in_one_direction() -> None:
    def between(part: float) -> Arrivals:
        rate = PROMPTS.requests_per_s * (1 - part) + STREAMS.requests_per_s * part
        prompts, streams = PROMPTS.requests_per_s * (1 - part) / rate, STREAMS.requests_per_s * part / rate
        return Arrivals(
            rate,
            prompts * PROMPTS.prompt_tokens + streams * STREAMS.prompt_tokens,
            prompts * PROMPTS.output_tokens + streams * STREAMS.output_tokens,
        )

    course = run_course(FluidFleet("pppd"), [between(second / 900) for second in range(900)], SETTINGS)
    assert {role for _, _, role in course.fleet.flips} == {"decode"}


def test_a_square_load_faster_than_the_window_is_not_followed() -> None:
    loads = ([PROMPTS] * 10 + [STREAMS] * 10) * 30
    assert count_flips("ppdd", loads) <= 2


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_noise_alone_flips_nothing(noise: float) -> None:
    calm = Arrivals(2, 1500, 150)
    assert [count_flips("ppdd", [calm] * 300, noise, seed) for seed in range(3)] == [0] * 3


# ---- properties --------------------------------------------------------------

numbers = st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.1, 3.0, 50.0])
rows = st.fixed_dictionaries(
    {
        "wait_s": numbers, "step_s": numbers, "ttft": numbers, "tpot": numbers, "requests": numbers,
        "prompt": st.sampled_from([10.0, 500.0, 5000.0]), "output": st.sampled_from([1.0, 60.0, 2000.0]),
        "running": st.integers(0, 64), "takes": st.booleans(),
        "wrong": st.sampled_from(["", "", "", "nan", "old", "none"]),
        "unready": st.integers(0, 7), "seconds": st.sampled_from([1.0, 7.0, 40.0]), "repeats": st.integers(1, 6),
    }
)  # fmt: skip


def view_of(row: dict[str, object], workers: tuple[WorkerView, ...], now_s: float) -> FleetView:
    number = {name: value for name, value in row.items() if isinstance(value, float)}
    wrong = row["wrong"]
    running = int(number.get("running", 0)) or row["running"]
    seen = tuple(
        replace(
            each,
            num_running=running,
            is_ready=position != row["unready"],
            age_s=9.0 if wrong == "old" else 0.1,
        )
        for position, each in enumerate(workers)
    )
    demand = Demand(number["requests"], number["prompt"], 0.0, number["output"])
    return FleetView(
        now_s,
        "m",
        seen,  # type: ignore[arg-type]
        Attainment(30, 10, 10, number["ttft"], number["tpot"]),
        None if wrong == "none" else demand,
        math.nan if wrong == "nan" else number["wait_s"],
        number["step_s"],
    )


@given(st.text("pdPD", min_size=1, max_size=6), st.lists(rows, max_size=25))
@settings(max_examples=60, deadline=None)
def test_whatever_is_measured_flips_are_few_and_lawful(roles: str, measured: list[dict[str, object]]) -> None:
    workers, state, now_s, flips = fleet(roles).workers, ControllerState(), 100.0, []
    for row in measured:
        for _ in range(row["repeats"]):  # type: ignore[call-overload]
            now_s += row["seconds"]  # type: ignore[operator]
            view = view_of(row, workers, now_s)
            state, verdict = decide(view, state, OBJECTIVES, SETTINGS)
            if row["wrong"]:
                assert verdict.kind == "none"
            for change in verdict.changes:
                before = next(each for each in view.workers if each.worker_id == change.worker_id)
                assert before.is_ready
                assert not before.is_fixed
                if verdict.kind == "budgets":
                    assert before.role == change.role
                else:
                    assert len(verdict.changes) == 1
                    assert len(view.ready(before.role)) > 1
            if verdict.kind == "flip":
                flips.append(now_s)
            if row["takes"]:
                told = {change.worker_id: change for change in verdict.changes}
                workers = tuple(
                    replace(each, role=told[each.worker_id].role, budgets=told[each.worker_id].budgets)
                    if each.worker_id in told
                    else each
                    for each in workers
                )
    assert all(later - earlier >= SETTINGS.dwell_s for earlier, later in itertools.pairwise(flips))
    assert not flips or flips[0] >= 100 + SETTINGS.dwell_s


@given(st.text("pd", min_size=2, max_size=6), st.lists(rows, min_size=1, max_size=10), st.floats(0.9, 1.1))
@settings(max_examples=20, deadline=None)
def test_at_a_constant_load_flips_come_to_an_end(roles: str, measured: list[dict[str, object]], noise: float) -> None:
    workers, state, now_s, num_flips = fleet(roles).workers, IDLE, 100.0, 0
    for turn in range(250):
        row = measured[turn % len(measured)] | {"wrong": "", "unready": 7, "running": 8}
        now_s += 21.0
        view = replace(
            view_of(row, workers, now_s), demand=replace(MANY_PROMPTS, requests_per_s=noise * (1 + turn % 2 / 9))
        )
        state, verdict = decide(view, state, OBJECTIVES, SETTINGS)
        num_flips += verdict.kind == "flip"
        told = {change.worker_id: change for change in verdict.changes}
        workers = tuple(
            replace(each, role=told[each.worker_id].role, budgets=told[each.worker_id].budgets)
            if each.worker_id in told
            else each
            for each in workers
        )
    assert num_flips <= 2 * len(roles)
