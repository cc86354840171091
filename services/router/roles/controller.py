"""The shell of the policy: makes the view each second, decides where it leads, and tells the workers.

    session frames ──▶ view ─┐
    requests ──▶ ledger ──▶ Redis: account, lease ──▶ all accounts ──▶ decide() ──▶ minutes, log
                                                                          └──▶ session.bend() ──▶ the worker's own word

One task, which its owner starts and closes. What it decides by is the workers' word and the requests of the window, so
that a new leader needs nothing of the old one's; it waits out a dwell time first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import msgspec

from kvstore.registry import REDIS_FAILURES, describe
from services.budgets import Objectives
from services.router.fleet import SessionDown, Workers
from services.router.metrics import RouterMetrics
from services.router.roles.explain import Change, Verdict
from services.router.roles.lease import LEASE_S, Lease, Scripts
from services.router.roles.ledger import Ledger, Tally
from services.router.roles.measurements import FleetView
from services.router.roles.minutes import Minutes, finite, worker_rows
from services.router.roles.policy import decide
from services.router.roles.sight import fleet_view
from services.router.roles.state import ControllerState, Settings

log = logging.getLogger(__name__)

_BEAT_S: Final = 1.0


@dataclass
class _Desk:
    """What is known of one model's fleet."""

    lease: Lease
    state: ControllerState = field(default_factory=ControllerState)
    leader: str = ""
    led_s: float = 0.0
    """When it led last."""
    minutes: Minutes = field(default_factory=Minutes)
    view: FleetView | None = None
    trouble: str = ""
    """Why nothing can be decided; empty: it can, or another router leads."""


class Controller:
    """One router process's. Event loop only."""

    def __init__(
        self,
        workers: Workers,
        ledger: Ledger,
        num_queued_tokens: Callable[[str], float],
        redis: Scripts | None,
        router_id: str,
        objectives: Objectives,
        settings: Settings,
        stands: bool,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        unix_clock: Callable[[], float],
    ) -> None:
        """`redis` None: there is none, and nobody leads. `stands`: it may lead; else it only says what it counts.
        `num_queued_tokens`: of a served name's prompts that wait in this router."""
        self._workers = workers
        self._ledger = ledger
        self._num_queued_tokens = num_queued_tokens
        self._redis = redis
        self._router_id = router_id
        self._objectives = objectives
        self._settings = settings
        self._stands = stands
        self._metrics = metrics
        self._clock = clock
        self._unix_clock = unix_clock
        self._desks: dict[str, _Desk] = {}
        self._task: asyncio.Task[None] | None = None
        metrics.controller_leader.set_function(lambda: sum(desk.lease.is_held for desk in self._desks.values()))

    def start(self) -> None:
        """Begin to beat, if there is a Redis to beat in, and there are objectives to decide by."""
        if self._redis is not None and self._objectives != Objectives():
            self._task = asyncio.create_task(self._run(), name="controller of roles")
            self._task.add_done_callback(_on_ended)

    async def close(self) -> None:
        """End, and let another one lead at once."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        for desk in self._desks.values():
            with contextlib.suppress(*REDIS_FAILURES):  # then the lease runs out
                await desk.lease.resign()

    async def _run(self) -> None:
        while True:
            try:
                await self.beat()
            except Exception:  # a bug of ours: roles stay as they are, and streams go on
                log.exception("the controller of roles failed; it tries again")
            await asyncio.sleep(_BEAT_S)

    async def beat(self) -> None:
        """One round: for each model that has elastic workers."""
        names: dict[str, set[str]] = {}
        for record in self._workers.records:
            if record.prefills and record.decodes:
                names.setdefault(record.model_fingerprint, set()).update(record.model_names)
        for model in [each for each in self._desks if each not in names]:
            del self._desks[model]  # the lease runs out
        for model, served in names.items():
            await self._beat_model(model, sorted(served))

    async def _beat_model(self, model: str, names: list[str]) -> None:
        if self._redis is None:
            return
        desk = self._desks.get(model)
        if desk is None:
            lease = Lease(self._redis, model, self._router_id, self._clock)
            desk = self._desks[model] = _Desk(lease)
        account = self._ledger.window(names, sum(map(self._num_queued_tokens, names)))
        try:
            beat = await desk.lease.beat(msgspec.json.encode(account).decode(), self._stands)
        except REDIS_FAILURES as error:
            self._pause(desk, model, f"Redis is away: {describe(error)}")
            return
        desk.leader = beat.leader
        if beat.accounts is None:
            desk.state, desk.trouble, desk.view = ControllerState(), "", None
            return
        try:
            tally = _added_up(beat.accounts)
        except msgspec.MsgspecError as error:
            self._pause(desk, model, f"a router's account cannot be read: {error}")
            return
        desk.trouble, desk.led_s = "", self._clock()
        desk.view = view = fleet_view(self._workers, model, tally, self._clock())
        desk.state, verdict = decide(view, desk.state, self._objectives, self._settings)
        self._note(desk, model, verdict)
        for change in verdict.changes:
            self._tell(desk, verdict, change)

    def _pause(self, desk: _Desk, model: str, trouble: str) -> None:
        """Nothing can be decided. A side is not short for as long as nobody measures it."""
        if not desk.trouble:
            log.warning("model %s: roles of elastic workers stay as they are: %s", model, trouble)
        is_over = self._clock() - desk.led_s > LEASE_S  # somebody else may have led since
        desk.state = ControllerState() if is_over else replace(desk.state, short=None)
        desk.trouble, desk.leader, desk.view = trouble, "", None

    def _note(self, desk: _Desk, model: str, verdict: Verdict) -> None:
        if desk.minutes.note(verdict, desk.view, self._unix_clock()):
            level = logging.DEBUG if verdict.kind == "none" else logging.INFO
            numbers = " ".join(f"{name}={value:.4g}" for name, value in verdict.inputs.items())
            log.log(
                level, "model %s: %s: %s; %s; %s", model, verdict.kind, verdict.reason, verdict.counterfactual, numbers
            )

    def _tell(self, desk: _Desk, verdict: Verdict, change: Change) -> None:
        if not desk.lease.is_held:
            return
        session = next(
            (
                self._workers.session_of(record)
                for record in self._workers.records
                if record.key == (change.worker_id, change.incarnation)
            ),
            None,
        )
        if session is None:
            return  # it has gone meanwhile, which the next view shows
        with contextlib.suppress(SessionDown):  # the same
            session.bend(change.role, change.budgets)
            if verdict.kind == "flip":
                self._metrics.count_flip(change.role)

    def to_json(self) -> list[dict[str, object]]:
        """One row per model that has elastic workers."""
        return [self._row(model, desk) for model, desk in self._desks.items()]

    def _row(self, model: str, desk: _Desk) -> dict[str, object]:
        view, is_leader = desk.view, desk.lease.is_held
        until_s = desk.state.no_flip_until_s
        return {
            "model_fingerprint": model,
            "stands": self._stands,
            "leader": desk.leader or None,
            "is_leader": is_leader,
            "trouble": desk.trouble or None,
            "objectives": {
                "ttft_seconds": finite(self._objectives.ttft_s),
                "tpot_seconds": finite(self._objectives.tpot_s),
            },
            "settings": asdict(self._settings),
            "dwell_left_seconds": max(until_s - self._clock(), 0.0) if is_leader and until_s is not None else None,
            "pending": None if desk.state.pending is None else desk.state.pending.change.worker_id,
            "workers": worker_rows(view.workers) if view is not None else [],
            "decisions": desk.minutes.to_json(),
        }


def _added_up(accounts: Iterable[bytes]) -> Tally:
    total = Tally()
    for account in accounts:
        total.add(msgspec.json.decode(account, type=Tally))
    return total


def _on_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the %s crashed: roles stay as they are", task.get_name(), exc_info=error)
