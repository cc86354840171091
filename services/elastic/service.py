"""An elastic worker's service: the prefill and the decode worker's own, over one engine.

Each half has requests of its own in the engine, whose ids never meet: a prefill order's ends in a part of its transfer,
a live request's in its session, handle and attempt with points between. What a step brings for the one the other passes
over. The halves share nothing else: a prompt for the decode half that this worker is to compute is computed by that
half itself, and never ordered.
"""

from __future__ import annotations

import asyncio

from services.decode.budget_keeper import BudgetKeeper
from services.decode.service import DecodeService
from services.elastic.config import ElasticConfig
from services.engine.api import Request, StepOutput
from services.orders import OrderServer
from services.prefill.service import PrefillService
from services.worker.assembly import WorkerParts


class ElasticService:
    """Serves one elastic worker."""

    def __init__(self, config: ElasticConfig, parts: WorkerParts) -> None:
        self._budgets = BudgetKeeper(parts, config.starting_role, config.budgets)
        self._prefill = PrefillService(config, parts)
        # Behind the other: of what is in a handoff this one knows.
        self._decode = DecodeService(config, parts, self._budgets)
        self._halves = (self._prefill, self._decode)

    def register(self, server: OrderServer) -> None:
        for half in self._halves:
            half.register(server)

    def state(self) -> dict[str, object]:
        return {**self._budgets.state(), **self._prefill.state(), **self._decode.state()}

    def set_stuck(self, stuck: str) -> None:
        for half in self._halves:
            half.set_stuck(stuck)

    def begin_drain(self) -> None:
        for half in self._halves:
            half.begin_drain()

    async def drain(self, timeout_s: float) -> None:
        """Let orders end and streams leave at the same time: neither waits for the other half."""
        self.begin_drain()
        async with asyncio.TaskGroup() as tasks:
            for half in self._halves:
                tasks.create_task(half.drain(timeout_s))

    async def close(self) -> None:
        for half in self._halves:
            await half.close()

    async def settle(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for half in self._halves:
                tasks.create_task(half.settle())

    # ---- engine thread ----------------------------------------------------

    def on_begun(self, request: Request) -> None:
        for half in self._halves:
            half.on_begun(request)

    def on_step(self, output: StepOutput) -> None:
        for half in self._halves:
            half.on_step(output)
