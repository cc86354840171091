"""A router: the product's, from its ASGI application's edge to its sessions with workers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from kvstore.index import IndexObserver, IndexReader
from kvstore.index.session import LookupOutcome
from kvstore.registry import Membership
from services.router.app import generating_endpoints
from services.router.config import RouterConfig
from services.router.edge import Edge, Guard, RouterParts
from services.router.fleet import Workers
from services.router.fleet.session import WorkerSession
from services.router.process import Seams, open_parts
from services.router.processes import new_request_id
from services.router.tenants import Keyring
from services.router.text import ModelDirectory
from tests.simulation.fleet import elastic
from tests.simulation.fleet.client import MAX_WORKER_DEATHS, REQUEST_TIMEOUT_S, Client
from tests.simulation.fleet.orders import SimOrders
from tests.simulation.fleet.redis_host import REDIS_URL
from tests.simulation.fleet.worker import MODEL
from tests.simulation.threads import SimThreads

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

_CONFIG: Final = RouterConfig(
    request_timeout_s=REQUEST_TIMEOUT_S,
    max_attempts=4,
    max_worker_deaths=MAX_WORKER_DEATHS,
    resume_wait_s=15.0,
    reconnect_max_s=1.0,
    index_timeout_s=1.0,
    max_concurrent_requests=64,
    max_queue=64,
)


class _Lookups(IndexObserver):
    """Notes how lookups end."""

    def __init__(self, world: FleetWorld) -> None:
        self._world = world

    def lookup_ended(self, outcome: LookupOutcome, num_blocks: int, num_held: int, duration_s: float) -> None:
        self._world.reach(f"lookup {outcome.value}{', found' if num_held else ''}")


class SimRouter:
    """One router, without its HTTP parser."""

    def __init__(self, world: FleetWorld, name: str, number: int) -> None:
        self.name = name
        self.names = (name,)
        self.process = world.loop.new_process(f"{name}/{number}")
        self.num_live = 0
        self.is_leaving = False
        self._world = world
        self._is_over = world.loop.create_future()
        self._app: Edge | None = None
        self._models: ModelDirectory | None = None
        self._workers: Workers | None = None
        with world.loop.within(self.process):
            self._membership = Membership(REDIS_URL)
            self._index = IndexReader(REDIS_URL, observer=_Lookups(world))

    @property
    def is_ready(self) -> bool:
        """Whether a balancer sends it clients."""
        is_up = not (self.process.is_killed or self.process.is_paused or self.is_leaving)
        return is_up and self._models is not None and MODEL in self._models.names()

    @property
    def num_sessions_up(self) -> int:
        """Decode workers that it can send orders to."""
        return 0 if self._workers is None else self._workers.num_sessions_up

    @property
    def sessions(self) -> list[WorkerSession]:
        """Those with workers that it can send orders to."""
        return [] if self._workers is None else [each for each in self._workers._sessions.values() if each.connected]

    async def start(self) -> None:
        """Until it can be asked."""
        await self._membership.start()
        await self._index.start()
        parts = self._world.loop.create_future()
        self._running = self._world.loop.create_task(self._run(parts), name="router")
        self._make_app(await parts)

    async def _run(self, opened: asyncio.Future[RouterParts]) -> None:
        loop, orders = self._world.loop, SimOrders(self._world.orders, self.name, self.process)
        seams = Seams(orders, SimThreads(loop), loop.time, self._world.unix_s)
        config = replace(_CONFIG, **elastic.OBJECTIVES) if self._world.plan.world == "elastic" else _CONFIG
        async with open_parts(config, self._membership, self.process.name, seams, self._index) as parts:
            opened.set_result(parts)
            await self._is_over

    def _make_app(self, parts: RouterParts) -> None:
        self._workers = parts.workers
        self._models, endpoints = parts.models, generating_endpoints(parts)

        async def front(scope: Any, receive: Any, send: Any) -> None:
            await endpoints[scope["path"]](scope, receive, send)

        guard = Guard(front, Keyring((), None), parts.metrics)
        self._app = Edge(
            guard,
            parts.metrics,
            parts.clock,
            root_path="",
            roots={"v1"},
            new_id=lambda: new_request_id(0),
            logs_requests=False,
        )

    async def serve(self, client: Client) -> str:
        """Serve one client; how it ended."""
        self.num_live += 1
        try:
            return await client.ask(self._app, MODEL)  # type: ignore[arg-type]
        finally:
            self.num_live -= 1

    async def close(self) -> None:
        """End all sessions."""
        self._is_over.set_result(None)
        await self._running
        await self._index.close()
        await self._membership.close()
