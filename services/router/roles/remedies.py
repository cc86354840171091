"""Chooses what to change for the side that is short: budgets if that does, else the role of one worker. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from services.budgets import Budgets, Objectives, Role, budgets_of
from services.router.roles.explain import Change, Gate, Verdict, closest, held_back
from services.router.roles.levels import LADDER, changes_to, decode_budgets, level_of
from services.router.roles.measurements import FleetView, WorkerView
from services.router.roles.prediction import Load, Pressures
from services.router.roles.pressures import Measured, predicted
from services.router.roles.state import ControllerState, Pending, Settings
from services.router.roles.turns import Work

_SAFE: Final = 0.9
"""Where a side may be predicted to be after a change."""
_CAUSE: Final = 0.6
"""A side that has less to do misses its objective for other reasons, and another role would not help."""
_HELPS: Final = 0.25
"""Budgets that are not predicted to do are to take so much off the short side's pressure; a flip, for its one worker,
such a part of that worker's share in the fleet."""


@dataclass(frozen=True)
class Case:
    """A side that has been short for long enough."""

    view: FleetView
    state: ControllerState
    objectives: Objectives
    settings: Settings
    measured: Measured
    load: Load
    short: Role
    gates: list[Gate]
    """That have led here."""

    @property
    def other(self) -> Role:
        return "decode" if self.short == "prefill" else "prefill"

    @property
    def work(self) -> Work:
        return Work(self.load.prefill_work, self.load.decode_work)

    @property
    def level(self) -> int:
        return level_of(self.view.ready("decode"))

    def predicted(self, budgets: Budgets, flips: bool = False) -> Pressures:
        return predicted(self.view, self.load, self.objectives, budgets, self.short if flips else None)

    def at_level(self, level: int) -> Pressures:
        return self.predicted(decode_budgets(level, self.objectives))

    def is_safe(self, pressures: Pressures) -> bool:
        return pressures.of(self.other) <= _SAFE


def relieve(case: Case) -> tuple[ControllerState, Verdict]:
    """The state after it, and what is to be done."""
    levels = _levels(case)
    does = next((each for each in levels if _does(case, case.at_level(each))), None)
    if does is not None:
        return _move_budgets(case, does, "budgets are predicted to do", case.settings.window_s)
    gates = _flip_gates(case)
    blocked = held_back(gates)
    if blocked is None:
        return _flip(case, gates)
    enough = (1 - _HELPS) * case.at_level(case.level).of(case.short)
    helps = [each for each in levels if case.is_safe(at := case.at_level(each)) and at.of(case.short) <= enough]
    if helps:
        return _move_budgets(case, helps[-1], "budgets help, and no role may be changed", 0.0)
    reason = f"{case.short} is short, and no role may be changed"
    return case.state, Verdict("none", reason, (), {}, blocked.words("a worker flipped"), blocked)


def _does(case: Case, pressures: Pressures) -> bool:
    return case.is_safe(pressures) and pressures.of(case.short) <= _SAFE


# ---- budgets -----------------------------------------------------------------


def _levels(case: Case) -> list[int]:
    """Those that are better for the short side than the present one, the nearest first."""
    if all(worker.is_fixed for worker in case.view.ready("decode")) or not case.view.ready(case.short):
        return []
    turn = case.state.budgets.gate(case.short, case.work, case.measured.worst)
    if turn is not None and not turn.passes:
        return []
    return list(range(case.level + 1, len(LADDER)) if case.short == "prefill" else range(case.level - 1, -1, -1))


def _move_budgets(case: Case, level: int, why: str, no_flip_s: float) -> tuple[ControllerState, Verdict]:
    """`no_flip_s`: so long it is to show that it does, before a role is changed."""
    state, now_s = case.state, case.view.at_s
    left = Gate("seconds until budgets may move", max(state.no_budgets_until_s - now_s, 0.0), 0, "below")
    reason = f"{case.short} is short, and {why}: level {case.level} to {level}"
    if not left.passes:
        return state, Verdict("none", reason, (), {}, left.words("budgets moved"), left)
    state = replace(
        state,
        short=None,
        no_budgets_until_s=now_s + case.settings.window_s,
        no_flip_until_s=max(state.no_flip_until_s or 0.0, now_s + no_flip_s),
        budgets=state.budgets.moved(case.short, case.work, case.measured.worst),
    )
    after = case.at_level(level)
    gate = closest([*case.gates, Gate(f"predicted {case.other}", after.of(case.other), _SAFE, "below")])
    return state, Verdict(
        "budgets",
        reason,
        changes_to(level, case.view.workers, case.objectives),
        {"level_after": level, "predicted_prefill_after": after.prefill, "predicted_decode_after": after.decode},
        gate.words("nothing changed"),
        gate,
    )


# ---- roles -------------------------------------------------------------------


def _candidates(case: Case) -> list[WorkerView]:
    """Those of the other role that may be flipped, the one first whose work is the least to bend."""
    workers = case.view.ready(case.other)
    if len(workers) < 2:
        return []

    def cost(worker: WorkerView) -> tuple[object, ...]:
        streams, prompts = (worker.num_context_tokens, worker.num_running), worker.num_waiting_tokens
        return (
            (*streams, prompts, worker.worker_id) if case.other == "decode" else (prompts, *streams, worker.worker_id)
        )

    return sorted((worker for worker in workers if not worker.is_fixed), key=cost)


def _flip_gates(case: Case) -> list[Gate]:
    """What a flip depends on, beside that a side is short."""
    now_s, until_s = case.view.at_s, case.state.no_flip_until_s or 0.0
    gates = [
        Gate("workers that may be flipped", len(_candidates(case)), 1, "above"),
        Gate(f"load of {case.short}", case.measured.cause(case.short), _CAUSE, "above"),
        Gate("seconds until a role may be changed", max(until_s - now_s, 0.0), 0, "below"),
    ]
    if gates[0].passes:
        after = case.predicted(decode_budgets(case.level, case.objectives), flips=True)
        gates.append(Gate(f"predicted {case.other} after the flip", after.of(case.other), _SAFE, "below"))
        # What a role does by itself: were prompts beside streams counted, each worker would do nearly as well for both.
        alone = Budgets(case.objectives.tpot_s, 0)
        now, after = case.predicted(alone), case.predicted(alone, flips=True)
        part, enough = after.of(case.short) / max(now.of(case.short), 1e-9), 1 - _HELPS / len(case.view.workers)
        gates.append(Gate(f"predicted {case.short} after the flip, in parts of now", part, enough, "below"))
    turn = case.state.flips.gate(case.short, case.work, case.measured.worst)
    return gates if turn is None else [*gates, turn]


def _flip(case: Case, gates: list[Gate]) -> tuple[ControllerState, Verdict]:
    worker, now_s = _candidates(case)[0], case.view.at_s
    budgets = decode_budgets(case.level, case.objectives)
    if case.short == "prefill":
        budgets = budgets_of("prefill", case.objectives)
    change = Change(worker.worker_id, worker.incarnation, case.short, budgets)
    after = case.predicted(decode_budgets(case.level, case.objectives), flips=True)
    state = replace(
        case.state,
        short=None,
        pending=Pending(change, now_s, now_s),
        no_flip_until_s=now_s + case.settings.dwell_s,
        flips=case.state.flips.moved(case.short, case.work, case.measured.worst),
    )
    gate = closest([*case.gates, *(gate for gate in gates if "seconds" not in gate.measurement)])
    numbers = {"predicted_prefill_after": after.prefill, "predicted_decode_after": after.decode}
    reason = f"{case.short} is short: worker {worker.worker_id} from {case.other} to {case.short}"
    return state, Verdict("flip", reason, (change,), numbers, gate.words("no flip"), gate)
