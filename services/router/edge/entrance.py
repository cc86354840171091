"""Leads a request in: its deadlines, its key's limits, and room for it.

    arrived ─▶ expected delay ─▶ tokenized ─▶ expected delay ─▶ its key's limits ─▶ queue ─▶ room
                  503 too late                   503 too late      429 limit     429 full, 503 waited too long

The first look costs next to nothing, and spares an overloaded router the tokenizing of what it will refuse.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from services.budgets import Objectives
from services.router.admission import Admission, Applicant, Room
from services.router.edge.deadlines import Deadlines
from services.router.edge.limits import Limits, Spent
from services.router.errors import too_late
from services.router.objectives import ObjectiveTable
from services.router.openai import GenerationPlan
from services.router.sharing import Share, Shares
from services.router.sse import Message
from services.router.tenants import Tenant, name_of

_MAX_PRIORITY = 2**31 - 1  # what an order can carry


@dataclass(frozen=True)
class Visit:
    """One HTTP request on its way in, and what bounds it."""

    scope: Message
    tenant: Tenant | None
    share: Share
    deadlines: Deadlines
    clock: Callable[[], float]
    """That the deadlines are by."""
    applicant: Applicant
    objectives: Objectives
    """What its client is to get."""
    arrived_s: float

    @classmethod
    def of(
        cls,
        scope: Message,
        shares: Shares,
        deadlines: Deadlines,
        clock: Callable[[], float],
        client: str,
        model: str,
        priority: int,
        objectives: ObjectiveTable,
        arrived_s: float,
    ) -> Visit:
        """`client`: as the edge names it; `priority`: the request's own, which adds to its tenant's."""
        tenant: Tenant | None = scope["state"].get("tenant")
        share = shares.of(name_of(tenant))
        priority = min(max(priority + share.priority, -_MAX_PRIORITY), _MAX_PRIORITY)
        wanted = objectives.of_request(name_of(tenant), priority)
        return cls(scope, tenant, share, deadlines, clock, Applicant(model, client, priority), wanted, arrived_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until its end; None: without one."""
        return self.deadlines.left_s(self.clock())

    def check_delay(self, admission: Admission) -> None:
        """Raise ApiError 503 if its first token cannot be expected in time."""
        left_s = self.deadlines.first_token_s - self.clock()
        if left_s < math.inf:
            admission.check(self.applicant, left_s, self.deadlines.first_token_is_clients_own)

    @asynccontextmanager
    async def room(
        self, plan: GenerationPlan, admission: Admission, limits: Limits
    ) -> AsyncIterator[tuple[Room, Spent]]:
        """Room for a plan, for as long as it lasts; the body says in `Spent` what it used. Raises ApiError."""
        ttft_s = max(self.objectives.ttft_s - (self.clock() - self.arrived_s), 0.0)
        applicant = replace(self.applicant, num_prompt_tokens=sum(map(len, plan.prompts)), ttft_s=ttft_s)
        visit = replace(self, applicant=applicant)
        visit.check_delay(admission)
        async with limits.within(self.share, self.tenant, plan, self.scope, self.left_s) as spent:
            with admission.admit(plan.num_sequences, applicant) as room:
                timer = visit.end_of_waiting(room, admission)
                try:
                    yield room, spent
                finally:
                    if timer is not None:
                        timer.cancel()

    def end_of_waiting(self, room: Room, admission: Admission) -> asyncio.TimerHandle | None:
        """Refuse it if it still waits in the router when its first token could not be in time any more."""
        if self.deadlines.first_token_s >= self.deadlines.end_s:
            return None  # that deadline ends it
        estimate = admission.estimate(self.applicant)
        left_s = self.deadlines.first_token_s - self.clock() - (estimate.total_s - estimate.queue_s)
        refusal = too_late("The first token would come too late: the request still waits. Try again later.", 1)
        return asyncio.get_running_loop().call_later(max(left_s, 0), room.give_up, refusal)
