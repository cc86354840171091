"""Two routers side by side: what is done to one of them, what its clients and the workers see of it, and who serves on.

    killed, vanished   its clients see the end; each worker's session with it ends, and what it had there is given back
    stopped            its clients wait
    restarted          takes nobody on any more, finishes what it has, and comes back

A client asks any router that is ready, as a balancer does.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from services.decode.service import DecodeService
from tests.simulation.fleet.router import SimRouter
from tests.simulation.fleet.wishes import draw_wish
from tests.simulation.pool import Invariant

if TYPE_CHECKING:
    from tests.simulation.fleet.client import Client
    from tests.simulation.fleet.worker import SimWorker
    from tests.simulation.fleet.world import FleetWorld

NAMES: Final = ("r0", "r1")
FAULTS: Final = ("router killed", "router vanished", "router stopped", "router restarted")
_READY_S: Final = 30.0
_SERVE_S: Final = 30.0
_FINISH_S: Final = 30.0
_NOTICE_S: Final = 20.0  # a keepalive's 15 s, and more
_GIVE_BACK_S: Final = 2.0
_STEP_S: Final = 0.1
_AFTER_S: Final = 20.0  # until a worker has heard of it, and more
_CUT: Final = "cut: its router is gone"


class Routers:
    """Both, as their clients see them."""

    names = NAMES

    def __init__(self, world: FleetWorld) -> None:
        self.process = world.loop.new_process("clients")
        self._world = world
        self._here: dict[str, SimRouter] = {}
        self._num_starts: Counter[str] = Counter()
        self._fallen_s = -_AFTER_S
        self._gone: dict[SimRouter, asyncio.Future[None]] = {}
        self._reclaims: list[asyncio.Task[None]] = []

    @property
    def num_live(self) -> int:
        return sum(router.num_live for router in self._here.values())

    @property
    def num_sessions_up(self) -> int:
        """Of the one that has fewest."""
        return min((router.num_sessions_up for router in self._here.values()), default=0)

    async def start(self) -> None:
        for name in NAMES:
            self._start(name)
        await self._world.comes_true(lambda: all(router.is_ready for router in self._here.values()), _READY_S)

    async def close(self) -> None:
        await self._world.comes_true(lambda: all(router.is_ready for router in self._here.values()), _READY_S)
        await asyncio.gather(*self._reclaims)
        for router in self._here.values():
            await self._world.within(router.process, router.close())

    async def serve(self, client: Client) -> str:
        """Have a client served by one of them; how it ended."""
        await self._world.comes_true(lambda: bool(self._ready()), _READY_S)
        ready = self._ready()
        if not ready:
            return "error: there is no router"
        router = ready[self._world.loop.random.randrange(len(ready))]
        client.error_breaks = self._error_breaks
        serving, gone = self._world.within(router.process, router.serve(client)), self._gone[router]
        await asyncio.wait([serving, gone], return_when=asyncio.FIRST_COMPLETED)
        return serving.result() if serving.done() else _CUT

    def _error_breaks(self) -> Invariant:
        is_one_away = self._world.loop.time() < self._fallen_s + _AFTER_S
        return Invariant.SERVES_ON if is_one_away else Invariant.ONE_OUTCOME

    def fail(self, kind: str, lasts_s: float, name: str) -> bool:
        """Have one of them suffer one of `FAULTS`; False where they are not both well."""
        if len(self._ready()) < len(NAMES):
            return False
        router, world = self._here[name], self._world
        self._fallen_s = world.loop.time()
        match kind:
            case "router killed" | "router vanished":
                self._kill(router, silently=kind == "router vanished")
                world.healing.later(lasts_s / 3, lambda: self._start(name))
            case "router stopped":
                world.loop.pause(router.process)
                world.healing.later(lasts_s, lambda: world.loop.resume(router.process))
            case "router restarted":
                router.is_leaving = True
                world.within(world.loop.world, self._restart(router))
        world.within(self.process, self._see_the_other_serve(f"beside-{router.process.name}"))
        return True

    def _ready(self) -> list[SimRouter]:
        return [each for each in self._here.values() if each.is_ready]

    def _start(self, name: str) -> None:
        self._num_starts[name] += 1
        self._world.net.back(name)
        router = self._here[name] = SimRouter(self._world, name, self._num_starts[name])
        self._gone[router] = self._world.loop.create_future()
        self._world.within(router.process, router.start())

    def _kill(self, router: SimRouter, silently: bool) -> None:
        world = self._world
        del self._here[router.name]
        world.loop.kill(router.process)
        world.net.kill(router.name, silently)
        world.orders.kill(router.process, silently)
        self._gone[router].set_result(None)
        world.reach("router gone with clients" if router.num_live else "router gone without clients")
        self._reclaims.append(world.within(world.loop.world, self._see_it_reclaimed(router.process.name)))

    async def _restart(self, router: SimRouter) -> None:
        world = self._world
        if not await world.comes_true(lambda: not router.num_live, _FINISH_S):
            world.reach("cut by a restart")
        closing = world.within(router.process, router.close())
        if not await world.comes_true(lambda: closing.done(), _FINISH_S):
            world.report(Invariant.WAITS_END, f"{router.process.name} does not close")
        self._kill(router, silently=False)
        self._start(router.name)

    async def _see_the_other_serve(self, name: str) -> None:
        """Where nobody else fails, a request is served all the same."""
        if not self._world.is_gentle:
            return
        self._world.judge(Invariant.SERVES_ON)
        wish = replace(draw_wish(random.Random(name)), timeout_s=0.0)
        asked = self._world.within(self.process, self._world.ask(name, wish))
        await self._world.comes_true(asked.done, _SERVE_S)
        if not asked.done() or asked.result() not in ("whole", "left", _CUT):  # that one may fall next
            how = asked.result() if asked.done() else "no end"
            self._world.report(Invariant.SERVES_ON, f"{name}: the other router's request has {how}")

    async def _see_it_reclaimed(self, router_id: str) -> None:
        """Each worker hears that a router is gone, and then works for it no more."""
        self._world.judge(Invariant.RECLAIMED)
        services = {each.process.name: (each, each.service) for each in self._world.workers.values()}
        for name, (worker, service) in services.items():
            if not isinstance(service, DecodeService):
                continue

            def knows(service: DecodeService = service) -> bool:
                return any(session.router_id == router_id for session in service._sessions)

            def works(service: DecodeService = service) -> bool:
                return any(live.session.router_id == router_id for live in service._in_engine.lives())

            if works():
                self._world.reach("a gone router's work in an engine")
            if await self._lasts(worker, knows, _NOTICE_S):
                self._world.report(Invariant.RECLAIMED, f"{name} keeps a session with {router_id}")
            if await self._lasts(worker, works, _GIVE_BACK_S):
                self._world.report(Invariant.RECLAIMED, f"{name} works for {router_id}, which is gone")

    async def _lasts(self, worker: SimWorker, condition: Callable[[], bool], within_s: float) -> bool:
        """Whether it still holds after so many seconds in which the worker lived and ran."""
        left_s = within_s
        while left_s > 0 and condition() and not worker.process.is_killed:
            await asyncio.sleep(_STEP_S)
            left_s -= 0 if worker.process.is_paused else _STEP_S
        return condition() and not worker.process.is_killed
