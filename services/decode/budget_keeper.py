"""Keeps an elastic worker's role and budgets: as it began, and as a router's controller has changed them since."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from tandem.v1 import worker_pb2 as pb

from services.budgets import MIN_CHUNK, Budgets, Role
from services.engine.api import BudgetsFixed
from services.orders import budgets_to_proto
from services.worker import convert
from services.worker.assembly import WorkerParts
from services.worker.engine_thread import EngineCrashed

log = logging.getLogger(__name__)

_ANY = Budgets(1.0, MIN_CHUNK)  # bound both


class BudgetKeeper:
    """One worker's. The event loop's; the engine hears of new budgets between two steps.

    What it says is what the worker has: budgets that are refused, by us or by the engine, change nothing.
    """

    def __init__(self, parts: WorkerParts, role: Role, budgets: Budgets) -> None:
        """Begin with these. Before the engine's thread has started."""
        self._engine = parts.engine
        self._thread = parts.thread
        self.role: Role = role
        self.may_change = True
        """Whether its engine keeps to budgets: routers are told that before they try to change them."""
        try:
            parts.engine.set_budgets(_ANY)
            parts.engine.set_budgets(budgets)
        except BudgetsFixed as error:
            self.may_change = False
            log.warning("stays a %s worker without budgets: %s", role, error)

    def said(self) -> pb.Budgets:
        """Both, for a session's load."""
        return budgets_to_proto(self.role, self._engine.budgets)

    def state(self) -> dict[str, object]:
        """Both, for people."""
        message = self.said()
        return {
            "role_now": message.role,
            "budgets": {
                "tpot_s": message.tpot_s or None,
                "prompt_tokens": message.prompt_tokens if message.HasField("prompt_tokens") else None,
            },
        }

    def take(self, message: pb.Budgets) -> None:
        """Have the worker keep to what a router says."""
        try:
            role, budgets = convert.budgets_from_proto(message)
        except ValueError as error:
            log.warning("budgets of a router are refused: %s", error)
            return
        changing = self._thread.call(self._engine.set_budgets, budgets)
        changing.add_done_callback(partial(self._changed, role, budgets))

    def _changed(self, role: Role, budgets: Budgets, changing: asyncio.Future[None]) -> None:
        error = changing.exception()
        if isinstance(error, EngineCrashed):
            return  # the worker ends
        if error is not None:
            log.warning("stays a %s worker with the budgets that it has: %s", self.role, error)
            return
        self.role = role
        log.info("a %s worker from now on: %s", role, budgets)
