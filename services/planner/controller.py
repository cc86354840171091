"""Beats as the leader of a simulated elastic fleet: what is measured, the production policy's verdict, what is told.

What attainment and demand are of the last seconds is counted here as routers count it for their controller.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from services.budgets import Budgets, Objectives, Role
from services.planner.fleet import Setup
from services.planner.job import Job
from services.planner.router import SessionView
from services.planner.workload import FINGERPRINT
from services.rates import StepShape
from services.router.roles import Attainment, ControllerState, Demand, FleetView, Settings, WorkerView, decide

BEAT_S: Final = 1.0
_PERCENTILE: Final = 90


class _Ended(NamedTuple):
    at_s: float
    ttft_ratio: float
    tpot_ratio: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class Controller:
    """Decides roles and budgets of all workers of one fleet."""

    def __init__(
        self,
        setup: Setup,
        sessions: Sequence[SessionView],
        queued: Sequence[int],
        bend: Callable[[int, Role, Budgets], None],
        num_waiting_tokens: Callable[[], float],
    ) -> None:
        """`queued`: prompt tokens that the router expects each worker to compute. `bend`: tells a worker.
        `num_waiting_tokens`: of prompts that wait in the router."""
        self.num_flips = 0
        self._setup, self._sessions, self._queued, self._bend = setup, sessions, queued, bend
        self._num_waiting_tokens = num_waiting_tokens
        self._settings = Settings()
        self._state = ControllerState()
        self._arrived: deque[tuple[float, int]] = deque()
        self._ended: deque[_Ended] = deque()

    @property
    def _objectives(self) -> Objectives:
        return self._setup.objectives

    def arrived(self, now_s: float, num_prompt_tokens: int) -> None:
        """A request has come in."""
        self._arrived.append((now_s, num_prompt_tokens))

    def ended(self, now_s: float, job: Job) -> None:
        """One has ended."""
        request, objectives = job.request, self._objectives
        num_behind = request.num_output_tokens - 1
        tpot_s = (job.end_s - job.first_s) / num_behind if num_behind else 0.0
        ratios = (job.first_s - request.at_s) / objectives.ttft_s, tpot_s / objectives.tpot_s
        lengths = request.num_prompt_tokens, job.num_cached_tokens, request.num_output_tokens
        self._ended.append(_Ended(now_s, *ratios, *lengths))

    def beat(self, now_s: float) -> None:
        """Decide, and tell."""
        view = self._view(now_s)
        self._state, verdict = decide(view, self._state, self._objectives, self._settings)
        self.num_flips += verdict.kind == "flip"
        for change in verdict.changes:
            self._bend(int(change.worker_id), change.role, change.budgets)

    def _view(self, now_s: float) -> FleetView:
        since_s = now_s - self._settings.window_s
        for window in (self._arrived, self._ended):
            while window and window[0][0] < since_s:
                window.popleft()
        workers = tuple(self._worker(row, session) for row, session in enumerate(self._sessions))
        prefill = [each for each in workers if each.role == "prefill"]
        waiting = [each.num_waiting_tokens + self._num_waiting_tokens() / len(prefill) for each in prefill]
        rates = self._setup.rates
        steps_s = [
            rates.step_s(StepShape(0, 0, each.num_running, each.num_context_tokens))
            for each in workers
            if each.role == "decode" and each.num_running
        ]
        return FleetView(
            now_s,
            FINGERPRINT,
            workers,
            self._attainment(),
            self._demand(now_s),
            rates.prompt_s(math.ceil(sum(waiting) / len(waiting))) if waiting else 0.0,
            max(steps_s, default=0.0),
        )

    def _worker(self, row: int, session: SessionView) -> WorkerView:
        load, limits = session.load, self._setup.limits
        return WorkerView(
            worker_id=str(row),
            incarnation="",
            role=session.role,
            budgets=session.budgets,
            is_fixed=False,
            is_ready=True,
            age_s=0.0,
            num_running=load.num_running,
            num_context_tokens=load.num_context_tokens,
            num_waiting_tokens=max(load.num_waiting_tokens, self._queued[row]),
            max_running=limits.max_num_seqs,
            num_kv_tokens=limits.num_blocks * limits.block_size,
            kv_usage=1 - load.num_free_blocks / load.num_blocks,
            rates=self._setup.rates,
        )

    def _attainment(self) -> Attainment | None:
        if not self._ended:
            return None
        ttft, tpot = ([getattr(each, name) for each in self._ended] for name in ("ttft_ratio", "tpot_ratio"))
        return Attainment(
            len(ttft),
            sum(ratio <= 1 for ratio in ttft),
            sum(ratio <= 1 for ratio in tpot),
            float(np.percentile(ttft, _PERCENTILE)),
            float(np.percentile(tpot, _PERCENTILE)),
        )

    def _demand(self, now_s: float) -> Demand | None:
        if not self._arrived:
            return Demand(0.0, 0.0, 0.0, 0.0)
        if not self._ended:
            return None
        prompt = sum(num for _, num in self._arrived) / len(self._arrived)
        cached = sum(each.num_cached_tokens for each in self._ended) / sum(
            each.num_prompt_tokens for each in self._ended
        )
        return Demand(
            len(self._arrived) / max(min(self._settings.window_s, now_s), 1.0),
            prompt * (1 - cached),
            prompt * cached,
            sum(each.num_output_tokens for each in self._ended) / len(self._ended),
        )
