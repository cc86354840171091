"""Beats as the leader of a simulated elastic fleet: what is measured, the production policy's verdict, what is told.

Attainment and demand are counted by a router's own ledger, by the clock of the simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from services.budgets import Budgets, Role
from services.planner.fleet import Setup
from services.planner.job import Job
from services.planner.router import SessionView
from services.planner.workload import FINGERPRINT
from services.rates import StepShape
from services.router.finished import Account
from services.router.roles import (
    ControllerState,
    FleetView,
    Ledger,
    Settings,
    WorkerView,
    attainment_of,
    decide,
    demand_of,
)

BEAT_S: Final = 1.0


class Controller:
    """Decides roles and budgets of all workers of one fleet."""

    def __init__(
        self,
        setup: Setup,
        sessions: Sequence[SessionView],
        queued: Sequence[int],
        bend: Callable[[int, Role, Budgets], None],
        num_waiting_tokens: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        """`queued`: prompt tokens that the router expects each worker to compute. `bend`: tells a worker.
        `num_waiting_tokens`: of prompts that wait in the router."""
        self.num_flips = 0
        self._setup, self._sessions, self._queued, self._bend = setup, sessions, queued, bend
        self._num_waiting_tokens = num_waiting_tokens
        self._settings = Settings()
        self._state = ControllerState()
        self._ledger = Ledger(self._settings.window_s, clock)
        self._account = Account("", 0, setup.objectives, self._ledger.finished)

    def arrived(self, num_prompt_tokens: int) -> None:
        """A request has come in."""
        self._ledger.arrived(FINGERPRINT, 1, num_prompt_tokens)

    def ended(self, job: Job) -> None:
        """Its client has its last token."""
        request = job.request
        self._account.settle(
            FINGERPRINT,
            "length",
            request.num_prompt_tokens,
            job.num_cached_tokens,
            request.num_output_tokens,
            arrived_s=request.at_s,
            first_token_s=job.first_s,
            last_token_s=job.end_s,
            unix_s=job.end_s,
        )

    def beat(self, now_s: float) -> None:
        """Decide, and tell."""
        view = self._view(now_s)
        self._state, verdict = decide(view, self._state, self._setup.objectives, self._settings)
        self.num_flips += verdict.kind == "flip"
        for change in verdict.changes:
            self._bend(int(change.worker_id), change.role, change.budgets)

    def _view(self, now_s: float) -> FleetView:
        tally = self._ledger.window([FINGERPRINT], self._num_waiting_tokens())
        workers = tuple(self._worker(row, session) for row, session in enumerate(self._sessions))
        prefill = [each for each in workers if each.role == "prefill"]
        waiting = [each.num_waiting_tokens + tally.num_queued_tokens / len(prefill) for each in prefill]
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
            attainment_of(tally),
            demand_of(tally),
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
