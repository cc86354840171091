"""One run of a small fleet: a router, prefill and decode workers, a store, clients that check tokens, a nemesis.

    0 s         start; clients send requests, of which some share a prefix, and some are left by their client
    .. load_s   the nemesis deals the faults that this seed has drawn
    then        faults stop, the dead are restarted; requests must be served within SERVE_S
    then        everything closes in order, and every block is where it belongs

What runs is the product's but for the model's arithmetic (`computation`): router, services, prefetcher,
lender, engine, exchange. `simulate` runs one plan, as `tests.simulation.world` does.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore.block import BlockMemory
from tests.memory_transport import MemoryTransport, Switchboard
from tests.simulation.fleet.client import Client
from tests.simulation.fleet.nemesis import FleetNemesis
from tests.simulation.fleet.orders import OrderNet
from tests.simulation.fleet.redis_host import RedisHost
from tests.simulation.fleet.router import SimRouter
from tests.simulation.fleet.routers import Routers
from tests.simulation.fleet.store import SimStore
from tests.simulation.fleet.watching import watching
from tests.simulation.fleet.wishes import Wish, draw_wish
from tests.simulation.fleet.worker import ELASTIC_ROLES, ROLES, STORE, SimWorker
from tests.simulation.ledger import Ledger, Report
from tests.simulation.loop import SimLoop
from tests.simulation.nemesis import Healing
from tests.simulation.net import SimNet
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant

SERVE_S: Final = 30.0
WAIT_S: Final = 120.0
CLOSE_S: Final = 60.0
DRAIN_S: Final = 30.0
END_S: Final = 400.0
_NUM_CLIENTS: Final = 5


def simulate(plan: Plan) -> Report:
    """Run one plan to its verdict."""
    world = FleetWorld(plan)
    return verdict_of(world, world.main(), END_S)


def simulate_idle(idle_s: float) -> Report:
    """Run a fleet to which nothing happens, and that nobody asks anything for so long."""
    world = FleetWorld(Plan(0, "fleet", only=frozenset()))
    return verdict_of(world, world.undisturbed(partial(world.rest, idle_s)), idle_s + END_S)


def verdict_of(world: FleetWorld, run: Coroutine[Any, Any, None], end_s: float) -> Report:
    """Run a world, for `end_s` of its time at most."""
    with watching(world), TemporaryDirectory(prefix="tandem-simulation-") as directory:
        world.directory = Path(directory)
        report = world.verdict(run, end_s)
        for store in world.stores.values():
            store.vanish()
    return report


class FleetWorld(Ledger):
    """What all processes share, what is done to them, and the verdict."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        draw = plan.stream("mix")
        self.roles = ELASTIC_ROLES if plan.world == "elastic" else ROLES
        self.nemesis = FleetNemesis(self, draw)
        self.mix, self.is_gentle = self.nemesis.mix, self.nemesis.is_gentle
        self.loop = SimLoop(draw.getrandbits(64), shuffles="reorder" in self.mix)
        self.net = SimNet(self.loop)
        self.orders = OrderNet(self.loop, self.net)
        self.healing = Healing(self.loop)
        self.redis = RedisHost(self)
        self.workers: dict[str, SimWorker] = {}
        self.stores: dict[str, SimStore] = {}
        self.directory = Path()
        self.is_ending = False
        self.first: SimWorker | None = None
        self._switchboard = Switchboard()
        self._num_starts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.clients: dict[Client, None] = {}
        self.read_faults = self.nemesis.draw_read_faults(draw)
        self.net.weather = self.nemesis.weather()

    def unix_s(self) -> float:
        """Unix time."""
        return 1e9 + self.loop.time()

    # ---- for the processes ----

    def make_transport(self, memory: BlockMemory, name: str) -> MemoryTransport:
        seed = self.plan.stream(f"transport {name}").getrandbits(32)
        return MemoryTransport(memory, self._switchboard, self.read_faults, seed)

    def holders(self) -> list[tuple[str, SimWorker | SimStore]]:
        return [*self.workers.items(), *self.stores.items()]

    def alarm(self, what: str, whom: str = "") -> None:
        """Somebody is blamed, or a deadline has passed. Who leaves does not answer for ever."""
        self.reach(what.partition(":")[0])
        if self.is_gentle and whom not in self.nemesis.leavers:
            self.report(Invariant.NO_FALSE_ALARM, what)

    def hear(self, message: str) -> None:
        """A warning that the product has logged."""
        if message.startswith("prefill by"):
            self.alarm(f"handoff failed: {message}", message.split()[2])
        elif "announcing everything anew" in message:
            self.reach("index announced anew")
        elif "Redis at" in message:
            self.reach("lost Redis")

    # ---- the run ----

    async def main(self) -> None:
        await self._open()
        for number in range(_NUM_CLIENTS):
            self.within(self.router.process, self._be_client(number))
        await self.nemesis.deal()
        self.nemesis.stop()
        await self._see_it_serve()
        self.is_ending = True
        if not await self.comes_true(lambda: not self.router.num_live, WAIT_S):
            self.report(Invariant.WAITS_END, f"{self.router.num_live} requests have not ended after {WAIT_S} s")
        await self.comes_true(lambda: not any(each.is_leaving for _, each in self.holders()), CLOSE_S)
        await self._close()

    async def rest(self, idle_s: float) -> None:
        """Nobody asks anything for so long; then all requests that come at once are served at once."""
        await asyncio.sleep(idle_s)
        self.judge(Invariant.SERVES_AGAIN)
        said = await self._send_some("first")
        if set(said) != {"whole"}:
            self.report(Invariant.SERVES_AGAIN, f"after {idle_s} s of rest: {said}")

    async def undisturbed(self, run: Callable[[], Awaitable[None]]) -> None:
        """A run to which nothing happens but what `run` does."""
        await self._open()
        await run()
        await self._close()

    async def all_serve(self) -> None:
        """Until nobody leaves, and each router has a session with every decode worker."""
        num_decode = sum(role != "prefill" for role in self.roles.values())

        def are_here() -> bool:
            is_leaving = any(each.is_leaving for _, each in self.holders())
            return not is_leaving and self.router.num_sessions_up == num_decode

        if not await self.comes_true(are_here, SERVE_S):
            self.report(Invariant.SERVES_AGAIN, f"{SERVE_S} s later {self.router.num_sessions_up} decode workers serve")

    async def _open(self) -> None:
        for name in (*self.roles, STORE):
            self.start(name)
        self.router = Routers(self) if self.plan.world == "routers" else SimRouter(self, "r", 1)
        await self.within(self.router.process, self.router.start())
        await asyncio.sleep(1.0)

    async def _close(self) -> None:
        closing = [self.within(self.router.process, self.router.close())]
        if not await self.comes_true(lambda: closing[0].done(), CLOSE_S):
            self.report(Invariant.WAITS_END, "the router does not close")
        closing += [self.within(each.process, each.close()) for _, each in self.holders()]
        if not await self.comes_true(lambda: all(task.done() for task in closing), CLOSE_S):
            self.report(Invariant.WAITS_END, f"not closed after {CLOSE_S} s: {[t for t in closing if not t.done()]}")

    async def _be_client(self, client: int) -> None:
        for number in itertools.count():
            name = f"request {client}.{number}"
            draw = self.plan.stream(name)
            await asyncio.sleep(draw.uniform(0, 1.0))
            if self.is_ending:
                return
            if not self.does(name):
                continue
            leaves_after = draw.randrange(0, 10) if "aborts" in self.mix and draw.random() < 0.3 else None
            self.faults["aborts"] += leaves_after is not None
            wish = draw_wish(draw)
            num_copies = 2 if draw.random() < 0.1 else 1  # equal prompts at once
            asking = [self.ask(f"{client}.{number}.{copy}", wish, leaves_after) for copy in range(num_copies)]
            for how in await asyncio.gather(*asking):
                self._ended(how)

    async def ask(self, name: str, wish: Wish, leaves_after: int | None = None) -> str:
        client = Client(self, name, wish, leaves_after)
        self.clients[client] = None
        try:
            return await self.router.serve(client)
        finally:
            del self.clients[client]

    def _ended(self, how: str) -> None:
        self.reach(f"ended: {how.partition(':')[0]}")
        self.judge(Invariant.WAITS_END)
        if self.is_gentle:
            self.judge(Invariant.NO_FALSE_ALARM)
        if how.startswith("error"):
            self.alarm(f"stream in error: {how}")

    async def _see_it_serve(self) -> None:
        """Requests of the kind that everybody sends are served, now that nothing fails, and nobody is left out."""
        since_s = self.loop.time()
        for number in itertools.count():
            said = await self._send_some(f"last-{number}")
            self.judge(Invariant.SERVES_AGAIN)
            if set(said) == {"whole"}:
                break
            if self.loop.time() >= since_s + SERVE_S:
                self.report(Invariant.SERVES_AGAIN, f"{SERVE_S} s after the last fault: {said}")
                return
            await asyncio.sleep(0.5)
        await self.all_serve()

    async def _send_some(self, name: str) -> list[str]:
        """Four requests at once; how each has ended."""
        wishes = [replace(draw_wish(random.Random(f"{name}.{each}")), timeout_s=0.0) for each in range(4)]
        sent = [self.within(self.router.process, self.ask(f"{name}.{each}", wish)) for each, wish in enumerate(wishes)]
        await self.comes_true(lambda: all(request.done() for request in sent), SERVE_S)
        return [request.result() if request.done() else "no end" for request in sent]

    def within(self, process: Any, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        with self.loop.within(process):
            task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.report(Invariant.NO_INTERNAL_ERROR, f"{task.get_name()}: {error!r}")

    # ---- life and death ----

    def start(self, name: str) -> None:
        self._num_starts[name] += 1
        if self._num_starts[name] > 1:
            self.reach("restarted")
        self.net.back(name)
        self.nemesis.back(name)
        started: SimWorker | SimStore
        incarnation = f"{self._num_starts[name]:04d}-{name}"  # no two processes have the same
        if name == STORE:
            # As a node learns its layout from any worker, though none may be up now.
            self.first = self.first or next(iter(self.workers.values()))
            started = self.stores[name] = SimStore(self, name, incarnation, self.first, self.directory / name)
        else:
            started = self.workers[name] = SimWorker(self, name, self.roles[name], incarnation)
        started.threads.max_delay_s = 0.2 if "slow threads" in self.mix else 0.01
        self.within(started.process, started.start())

    def kill(self, name: str, silently: bool) -> None:
        worker = self.stores.pop(name) if name == STORE else self.workers.pop(name)
        if isinstance(worker, SimStore):
            worker.vanish()
        self.loop.kill(worker.process)
        self.net.kill(name, silently)
        self.orders.kill(worker.process, silently)
        self._switchboard.pull_out(worker.transport.descriptor())

    async def drain(self, worker: SimWorker | SimStore) -> None:
        await self.comes_true(lambda: not worker.num_filled, DRAIN_S)  # it holds blocks in nobody's name
        leaving = self.within(worker.process, worker.leave(DRAIN_S))
        if not await self.comes_true(lambda: worker.process.is_killed or leaving.done(), DRAIN_S + CLOSE_S):
            self.report(Invariant.WAITS_END, f"{worker.process.name} has not left after {DRAIN_S + CLOSE_S} s")
        if not worker.process.is_killed:
            self.reach("left in order")
            self.kill(worker.name, silently=False)
            self.start(worker.name)
