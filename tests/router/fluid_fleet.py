"""A fleet as a fluid: what arrives, prompts that wait, streams, and how they meet their objectives. Seeded.

It is no copy of the policy's prediction: it has queues that build up and drain, an effect that lags its cause by a
window, and noise on all that is measured.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

from services.budgets import Objectives, Role, budgets_of
from services.rates import Rates
from services.router.roles import Attainment, ControllerState, Demand, FleetView, Settings, Verdict, WorkerView, decide

RATES = Rates(0.01, 2e-4, 2e-8, 2e-4, 2e-7, spread=0.1, num_steps=100.0)
OBJECTIVES = Objectives(ttft_s=1.5, tpot_s=0.04)


def worker(worker_id: str, role: Role = "decode", **changes: object) -> WorkerView:
    """An elastic one that is ready and idle, unless said otherwise."""
    budgets = budgets_of(role, OBJECTIVES)
    plain = WorkerView(
        worker_id,
        "i1",
        role,
        budgets,
        False,
        True,
        0.1,
        0,
        0,
        0,
        64,
        400_000,
        0.0,
        RATES,  # type: ignore[arg-type]
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arrivals:
    requests_per_s: float
    prompt_tokens: float
    output_tokens: float


class FluidFleet:
    """Workers, a second per tick. They take what they are told at the next tick."""

    def __init__(self, roles: str, noise: float = 0.0, seed: int = 0) -> None:
        """`roles`: a letter per worker, p or d; P and D are fixed."""
        names: dict[str, Role] = {"p": "prefill", "d": "decode"}
        self.workers = [
            worker(f"w{number}", names[letter.lower()], is_fixed=letter.isupper())
            for number, letter in enumerate(roles)
        ]
        self._noise, self._random = noise, random.Random(seed)
        self._arrived: deque[Arrivals] = deque(maxlen=30)
        self._met: deque[tuple[float, float]] = deque(maxlen=30)  # TTFT and TPOT in parts of the objectives, by second
        self._backlog_s, self.streams, self.now_s = 0.0, 0.0, 0.0
        self.flips: list[tuple[float, str, str]] = []

    def count(self, role: str) -> int:
        return sum(each.role == role for each in self.workers)

    def tick(self, arrivals: Arrivals) -> None:
        """A second passes."""
        self.now_s += 1
        self._arrived.append(arrivals)
        num_prefill, num_decode = self.count("prefill"), self.count("decode")
        prompt_s = RATES.base_s + RATES.prompt_s(round(arrivals.prompt_tokens))
        token_s = RATES.running_s + RATES.context_token_s * (arrivals.prompt_tokens + arrivals.output_tokens / 2)
        # What would wait for longer is refused.
        self._backlog_s = min(self._backlog_s + arrivals.requests_per_s * prompt_s, 10.0 * num_prefill)
        seats = 64 * num_decode - self.streams
        done_s = min(self._backlog_s, num_prefill, max(seats, 0) * prompt_s)
        self._backlog_s -= done_s
        self.streams += done_s / prompt_s
        # What joins and leaves within the second is followed in small steps.
        for _ in range(20):
            step_s = RATES.base_s + token_s * self.streams / num_decode
            self.streams -= min(self.streams, 0.05 * self.streams / step_s / arrivals.output_tokens)
        step_s = RATES.base_s + token_s * self.streams / num_decode
        wait_s = self._backlog_s / num_prefill
        self._met.append(((prompt_s + 1.3 * wait_s) / OBJECTIVES.ttft_s, step_s / OBJECTIVES.tpot_s))

    def _about(self, value: float) -> float:
        return value * self._random.uniform(1 - self._noise, 1 + self._noise)

    def view(self) -> FleetView:
        """What a router would measure now."""
        last, num_decode = self._arrived[-1], self.count("decode")
        token_s = RATES.running_s + RATES.context_token_s * (last.prompt_tokens + last.output_tokens / 2)
        each = self.streams / num_decode
        ttft, tpot = (sorted(column)[int(0.9 * len(column))] for column in zip(*self._met, strict=True))
        mean = Arrivals(*(sum(values) / len(values) for values in zip(*map(_row, self._arrived), strict=True)))
        workers = tuple(
            replace(one, num_running=min(round(each), 64), num_context_tokens=round(each) * 500, kv_usage=0.1)
            if one.role == "decode"
            else one
            for one in self.workers
        )
        return FleetView(
            self.now_s,
            "m",
            workers,
            Attainment(50, 25, 25, self._about(ttft), self._about(tpot)),
            Demand(self._about(mean.requests_per_s), mean.prompt_tokens, 0.0, mean.output_tokens),
            self._about(self._backlog_s / self.count("prefill")),
            self._about(RATES.base_s + token_s * each),
        )

    def take(self, verdict: Verdict) -> None:
        """The workers take what they are told."""
        for change in verdict.changes:
            number = next(n for n, each in enumerate(self.workers) if each.worker_id == change.worker_id)
            if self.workers[number].role != change.role:
                assert not self.workers[number].is_fixed
                self.flips.append((self.now_s, change.worker_id, change.role))
            self.workers[number] = replace(self.workers[number], role=change.role, budgets=change.budgets)


def _row(arrivals: Arrivals) -> tuple[float, float, float]:
    return arrivals.requests_per_s, arrivals.prompt_tokens, arrivals.output_tokens


@dataclass
class Course:
    """What has become of a fleet under a load."""

    fleet: FluidFleet
    verdicts: list[Verdict]

    def good_seconds(self) -> float:
        """The part of the seconds in which both sides were within their objectives."""
        pressures = [max(v.inputs["prefill_pressure"], v.inputs["decode_pressure"]) for v in self.verdicts if v.inputs]
        return sum(each <= 1.05 for each in pressures) / max(len(pressures), 1)


def run_course(
    fleet: FluidFleet, loads: list[Arrivals], settings: Settings | None = None, moves: bool = True
) -> Course:
    """Let the fleet bear a load per second, led by the policy or, for comparison, as it stands."""
    state, verdicts = ControllerState(), []
    for load in loads:
        fleet.tick(load)
        state, verdict = decide(fleet.view(), state, OBJECTIVES, settings or Settings())
        verdicts.append(verdict)
        if moves:
            fleet.take(verdict)
    return Course(fleet, verdicts)
