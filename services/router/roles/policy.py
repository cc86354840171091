"""Decides who prefills and who decodes first, by what is measured and what is predicted. Pure: no clock, no I/O.

    which side is short    measured: waits and missed TTFT, or steps, TPOT, seats and blocks; the other one has room
    for how long           `hold_s`; it begins at 1.0 of the objective and goes on above 0.8 (`pressures`)
    budgets first          what decode workers carry beside their streams, as far as that is predicted to do
    then one role          if it is predicted to help, and not to make the other side miss (`remedies`)
    then nothing           for `dwell_s`, and until the worker itself has said its new role and a window has passed
    no way back            unless what comes in has changed since, or, once, the flip has made it worse (`turns`)

So at a constant load there are at most twice as many flips as workers that may be flipped. The workers' word is what
is known; the state has times and what came in at the last turn, and may be lost with its owner.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from services.budgets import Objectives
from services.router.roles.explain import Gate, Verdict, closest, held_back
from services.router.roles.levels import changes_to, level_of
from services.router.roles.measurements import FleetView, wrong_measurement
from services.router.roles.prediction import Load
from services.router.roles.pressures import SIDES, Measured, inputs_of, load_of, measure, short_side, side_gates
from services.router.roles.remedies import Case, relieve
from services.router.roles.state import ControllerState, Settings

_REPEAT_S: Final = 2.0
"""A worker has so long to take what it is sent, before it is sent again."""
_GIVE_UP_S: Final = 10.0


def decide(
    view: FleetView, state: ControllerState, objectives: Objectives, settings: Settings
) -> tuple[ControllerState, Verdict]:
    """What is to be changed now, if anything. Call it about once a second, with what is measured then."""
    if objectives == Objectives():
        return state, Verdict("none", "no objectives", counterfactual="decided, had requests an objective")
    wrong = wrong_measurement(view, settings.max_age_s)
    if not wrong and view.at_s < state.at_s:
        wrong = f"the clock went back from {state.at_s:.6g} to {view.at_s:.6g} s"
    if wrong or view.demand is None:
        # A side is short for as long as that is measured, and no longer.
        words = "decided, had that been measured"
        return replace(state, short=None), Verdict("none", f"wrong measurement: {wrong}", counterfactual=words)
    until_s = view.at_s + settings.dwell_s if state.no_flip_until_s is None else state.no_flip_until_s
    state = replace(state, at_s=view.at_s, no_flip_until_s=until_s)
    load = load_of(view, view.demand, settings.window_s)
    measured = measure(view, load, objectives)
    inputs = inputs_of(view, objectives, measured, load) | {"dwell_left_s": max(until_s - view.at_s, 0.0)}
    state, verdict = _await_word(view, state, settings)
    if verdict is None:
        state, verdict = _settle(view, state, objectives)
    if verdict is None:
        state, verdict = _look(view, state, objectives, settings, measured, load)
    return state, replace(verdict, inputs=inputs | verdict.inputs)


def _await_word(view: FleetView, state: ControllerState, settings: Settings) -> tuple[ControllerState, Verdict | None]:
    """Look whether a flip was taken; a verdict as long as that is open."""
    pending, now_s = state.pending, view.at_s
    if pending is None:
        return state, None
    change = pending.change
    worker = next((each for each in view.workers if each.worker_id == change.worker_id and each.is_ready), None)
    waited = Gate("seconds that it has not", now_s - pending.first_sent_s, _GIVE_UP_S, "below")
    is_lost = worker is None or worker.incarnation != change.incarnation or not waited.passes
    if worker is None or is_lost or worker.role == change.role:
        # Its effect is measured from now on, for a window at least.
        until_s = now_s + settings.window_s
        dwell_until_s = max(state.no_flip_until_s or 0.0, until_s)
        return replace(state, pending=None, no_flip_until_s=dwell_until_s, no_budgets_until_s=until_s), None
    reason = f"worker {change.worker_id} has not said yet that it is {change.role}"
    words = waited.words("thought better of it")
    if now_s < pending.sent_s + _REPEAT_S:
        return state, Verdict("none", reason, (), {}, words, waited)
    return replace(state, pending=replace(pending, sent_s=now_s)), Verdict(
        "again", reason, (change,), {}, words, waited
    )


def _settle(view: FleetView, state: ControllerState, objectives: Objectives) -> tuple[ControllerState, Verdict | None]:
    """Have all workers keep to what their role says: a new one, or one that has missed a message, may not."""
    changes = changes_to(level_of(view.ready("decode")), view.workers, objectives)
    if not changes or view.at_s < state.no_budgets_until_s:
        return state, None
    gate = Gate("workers with other budgets than their role's", len(changes), 1, "above")
    state = replace(state, no_budgets_until_s=view.at_s + _REPEAT_S)
    return state, Verdict("budgets", "budgets as the roles say", changes, {}, gate.words("nothing changed"), gate)


def _look(
    view: FleetView,
    state: ControllerState,
    objectives: Objectives,
    settings: Settings,
    measured: Measured,
    load: Load,
) -> tuple[ControllerState, Verdict]:
    """Look which side is short, and for how long."""
    short = short_side(measured, state.short)
    if short is None:
        return replace(state, short=None), _none_short(measured, state)
    gates = side_gates(short, measured, is_short=short == state.short)
    if short != state.short:
        state = replace(state, short=short, short_since_s=view.at_s)
    held = Gate(f"seconds that {short} is short", view.at_s - state.short_since_s, settings.hold_s, "above")
    if not held.passes:
        return state, Verdict("none", f"{short} is short, not for long yet", (), {}, held.words("changed"), held)
    return relieve(Case(view, state, objectives, settings, measured, load, short, [*gates, held]))


def _none_short(measured: Measured, state: ControllerState) -> Verdict:
    blocked = []
    for side in SIDES:
        gates = side_gates(side, measured, is_short=side == state.short)
        gate = held_back(gates)
        assert gate is not None, f"{side} is short"
        blocked.append(gate)
        if gates[0].passes:
            reason = f"{side} is short, and the other side has no room to help"
            return Verdict("none", reason, (), {}, gate.words("changed"), gate)
    gate = closest(blocked)
    return Verdict("none", "no side is short", (), {}, gate.words("changed"), gate)
