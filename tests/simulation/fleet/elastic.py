"""A fleet of elastic workers: where each begins, how long its steps say that they take, and how it is bent at random.

    bent          a worker is told another role and other budgets, as a router's controller tells it
    redirected    for a while requests are redirected, up to three times each, to anybody, wherever their prompts are
                  just then, and whether or not they have tokens already

What is natural happens beside that: the router has objectives, by which it deflects prompts, keeps answers and
redirects.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from tandem.v1 import worker_pb2 as pb

from services.budgets import UNLIMITED, Budgets, Role
from services.decode.redirecting import Course
from services.engine.api import StepOutput
from services.engine.native import Engine
from services.router.fleet import Placer, redirecting
from services.router.fleet.placed import Placement

if TYPE_CHECKING:
    from services.router.fleet.session import WorkerSession
    from tests.simulation.fleet.router import SimRouter
    from tests.simulation.fleet.world import FleetWorld

STARTING_ROLES: Final[dict[str, Role]] = {"e0": "prefill", "e1": "prefill", "e2": "decode", "e3": "decode"}
KINDS: Final = ("bent", "redirected")
TPOT_OBJECTIVE_MS: Final = 60.0
OBJECTIVES: Final = {"ttft_objective": 300.0, "tpot_objective": TPOT_OBJECTIVE_MS}
_STEP_S: Final = 0.02
_TOKEN_S: Final = 0.002
_MIN_TOKENS: Final = 16  # prompts are short here


class Stopwatch:
    """An engine's clock, by which a step takes time: in the simulated loop it is over in the moment of its beginning.

    So an engine learns rates, as in production. The time that really passes is drawn by its thread.
    """

    def __init__(self, unix_s: Callable[[], float]) -> None:
        self._unix_s = unix_s
        self._spent_s = 0.0

    def clock(self) -> float:
        return self._unix_s() + self._spent_s

    def spend(self, num_tokens: int) -> None:
        self._spent_s += _STEP_S + num_tokens * _TOKEN_S

    def watch(self, engine: Engine) -> None:
        """Have its steps begin and end at the true time."""
        step = engine.step

        def timed(*args: Any) -> StepOutput:
            try:
                return step(*args)
            finally:
                self._spent_s = 0.0

        engine.step = timed  # type: ignore[method-assign]


def deal(world: FleetWorld, router: SimRouter, kind: str, draw: random.Random) -> None:
    """Do one thing of `KINDS`."""
    now_s, session = world.loop.time(), _any_of(router, draw)
    if session is None:
        return
    world.faults[kind] += 1
    if kind == "redirected":
        lasts_s = draw.uniform(0.5, 4.0)
        world.story.append(f"{now_s:.3f} s: {kind} ({lasts_s:.1f} s)")
        world.nemesis.redirects_until_s = now_s + lasts_s
        return
    role: Role = draw.choice(["prefill", "decode"])
    budgets = Budgets(draw.choice([0.01, 0.048, 0.06, 1.0]), draw.choice([0, 32, 128, UNLIMITED]))
    world.story.append(f"{now_s:.3f} s: {kind} ({session.record.worker_id}, {role}, {budgets})")
    with world.loop.within(router.process):
        session.bend(role, budgets)


def _any_of(router: SimRouter, draw: random.Random) -> WorkerSession | None:
    sessions = sorted(router.sessions, key=lambda each: each.record.worker_id)
    return draw.choice(sessions) if sessions else None


def _redirect(world: FleetWorld, placement: Placement) -> None:
    """Have its prompt go on anywhere: at its decode worker by an empty list, or by its own name, at one that has it."""
    message, draw = pb.RedirectRequest(), world.loop.random
    for _ in range(draw.randrange(3)):
        session = _any_of(world.router, draw)  # type: ignore[arg-type]
        if session is not None:
            record = session.record
            message.prefill_targets.add(
                worker_id=record.worker_id,
                incarnation=record.incarnation,
                grpc_address=record.grpc_address,
                kv_address=record.kv_address,
            )
    if placement.redirect(message):
        world.reach("redirect sent")


@contextlib.contextmanager
def watching(world: FleetWorld) -> Iterator[None]:
    """See how prompts and answers bend."""
    goes_to, sent = Course.goes_to, Placer.sent

    def went(course: Course, worker_id: str) -> bool:
        is_redirected = goes_to(course, worker_id)
        if is_redirected:
            world.reach("redirected")
        return is_redirected

    def noted(placer: Placer, placement: Placement, *, comes_with_blocks: bool = False) -> None:
        if deflected := placement.decision.deflected:
            world.reach(f"deflected: {deflected}")
        sent(placer, placement, comes_with_blocks=comes_with_blocks)
        if world.loop.time() < world.nemesis.redirects_until_s:
            for _ in range(world.loop.random.randrange(4)):
                world.loop.call_later(world.loop.random.uniform(0, 1.0), _redirect, world, placement)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Course, "goes_to", went))
        stack.enter_context(mock.patch.object(Placer, "sent", noted))
        stack.enter_context(mock.patch.object(redirecting, "MIN_REDIRECTED_TOKENS", _MIN_TOKENS))
        yield
