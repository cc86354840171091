"""How much of its objective each side of a fleet uses, and which of them is short. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Final

from services.budgets import Budgets, Objectives, Role
from services.rates import mean_rates
from services.router.roles.explain import Gate, held_back
from services.router.roles.levels import decode_budgets, level_of
from services.router.roles.measurements import Demand, FleetView, WorkerView
from services.router.roles.prediction import MOST, Load, Pressures, Split, predict

SHORT: Final = 1.0
"""A pressure is the part of its objective that a side uses. From here on it is short..."""
ROOM: Final = 0.8
"""... and up to here it has room."""
SIDES: Final[tuple[Role, Role]] = ("prefill", "decode")
_WAIT_SHARE: Final = 0.5
"""Of the time to first token that is allowed, what a prompt may wait."""
_FULL: Final = 0.9
"""Of seats or blocks: then requests wait for them."""
_LITTLE: Final = 0.6
"""Of what decode workers can bear: with less to do they miss nothing by their streams."""
_MIN_REQUESTS: Final = 5
"""Of fewer there is no 90th percentile to speak of."""


@dataclass(frozen=True)
class Measured:
    """How much of its objective each side uses now."""

    prefill: float
    prefill_load: float
    """What a prompt that comes now has to wait, or what prompts there are for the prefill workers to do: the less."""
    prefill_cause: float
    """The more of these two: what a missed time to first token must be due to for a role to help."""
    decode: float
    decode_load: float
    """What steps with streams alone, seats and blocks come to."""
    tpot: float
    """What the requests of the window have met."""

    def cause(self, side: Role) -> float:
        """How much there is to do for a side, whatever its clients got."""
        return self.prefill_cause if side == "prefill" else self.decode_load

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode)


def measure(view: FleetView, load: Load, objectives: Objectives) -> Measured:
    """The pressures now."""
    prefill, decode, attained = view.ready("prefill"), view.ready("decode"), view.attainment
    ttft, tpot = 0.0, 0.0
    if attained is not None and attained.num_requests >= _MIN_REQUESTS:
        ttft, tpot = attained.ttft_ratio, attained.tpot_ratio
    wait = view.prefill_wait_s / (_WAIT_SHARE * objectives.ttft_s)
    kv = fmean([worker.kv_usage for worker in decode] or [0])
    decode_load = max(view.step_s / objectives.tpot_s, _mean_seats(decode) / _FULL, kv / _FULL)
    work = load.prefill_work / max(len(prefill), 1)
    if prefill and work >= SHORT and decode_load <= _LITTLE:
        # Streams alone would be in time: what they miss is due to prompts that too few prefill workers leave to them.
        ttft, tpot = max(ttft, tpot), 0.0
    # A role that nobody has is as short as can be.
    return Measured(
        prefill=min(max(wait, ttft), MOST) if prefill else MOST,
        prefill_load=min(wait, work) if prefill else MOST,
        prefill_cause=min(max(wait, work), MOST) if prefill else MOST,
        decode=min(max(decode_load, tpot), MOST) if decode else MOST,
        decode_load=min(decode_load, MOST) if decode else MOST,
        tpot=min(tpot, MOST),
    )


def _mean_seats(workers: Sequence[WorkerView]) -> float:
    return fmean([worker.num_running / worker.max_running for worker in workers] or [0])


def side_gates(side: Role, measured: Measured, is_short: bool) -> list[Gate]:
    """What makes a side short, while the other one has room. It is easier to stay so than to become so."""
    enter, room = (ROOM, SHORT) if is_short else (SHORT, ROOM)
    if side == "prefill":
        return [
            Gate("prefill_pressure", measured.prefill, enter, "above"),
            Gate("decode_load_pressure", measured.decode_load, room, "below"),
            Gate("tpot_pressure", measured.tpot, SHORT, "below"),
        ]
    return [
        Gate("decode_pressure", measured.decode, enter, "above"),
        Gate("prefill_load_pressure", measured.prefill_load, room, "below"),
    ]


def short_side(measured: Measured, before: Role | None) -> Role | None:
    """The side that is short; `before`: which one was, a moment ago."""
    for side in sorted(SIDES, key=lambda each: each != before):
        if held_back(side_gates(side, measured, side == before)) is None:
            return side
    return None


def load_of(view: FleetView, demand: Demand, horizon_s: float) -> Load:
    """What the fleet has to bear."""
    ready, num_prefill = [worker for worker in view.workers if worker.is_ready], len(view.ready("prefill"))
    load = Load(
        demand,
        mean_rates([worker.rates for worker in ready]),
        view.prefill_wait_s * num_prefill,
        fmean([worker.max_running for worker in ready] or [1]),
        fmean([worker.num_kv_tokens for worker in ready] or [1]),
        horizon_s,
    )
    # What waits for workers that have time for it is gone soon, or it waits for seats at others.
    return load if load.prefill_work > ROOM * num_prefill else replace(load, backlog_s=0.0)


def predicted(
    view: FleetView, load: Load, objectives: Objectives, budgets: Budgets, toward: Role | None = None
) -> Pressures:
    """The pressures with these budgets of decode workers, and with one worker more for a role."""
    off = {None: 0, "prefill": 1, "decode": -1}[toward]
    num_prefill, num_decode = len(view.ready("prefill")) + off, len(view.ready("decode")) - off
    return predict(Split(num_prefill, num_decode, budgets), load, objectives)


def inputs_of(view: FleetView, objectives: Objectives, measured: Measured, load: Load) -> dict[str, float]:
    """Every number that a decision looks at."""
    level = level_of(view.ready("decode"))
    now = predicted(view, load, objectives, decode_budgets(level, objectives))
    return {
        "ttft_objective_s": objectives.ttft_s,
        "tpot_objective_s": objectives.tpot_s,
        "num_prefill": len(view.ready("prefill")),
        "num_decode": len(view.ready("decode")),
        "num_fixed": sum(worker.is_fixed for worker in view.workers),
        "num_not_ready": sum(not worker.is_ready for worker in view.workers),
        "level": level,
        "prefill_wait_s": view.prefill_wait_s,
        "step_s": view.step_s,
        **({} if view.attainment is None else asdict(view.attainment)),
        **asdict(load.demand),
        **{f"{name}_pressure": value for name, value in asdict(measured).items()},
        "prefill_work": load.prefill_work,
        "decode_work": load.decode_work,
        "predicted_prefill": now.prefill,
        "predicted_decode": now.decode,
    }
