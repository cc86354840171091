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
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore.block import BlockHash, BlockMemory
from services.worker.assembly import Role
from tests.memory_transport import Faults, MemoryTransport, Switchboard
from tests.simulation.fleet.client import Client
from tests.simulation.fleet.impostor import intrude
from tests.simulation.fleet.orders import OrderNet
from tests.simulation.fleet.redis_host import FAULTS as OF_REDIS
from tests.simulation.fleet.redis_host import RedisHost
from tests.simulation.fleet.router import SimRouter
from tests.simulation.fleet.routers import FAULTS as OF_ROUTERS
from tests.simulation.fleet.routers import NAMES as ROUTERS
from tests.simulation.fleet.routers import Routers
from tests.simulation.fleet.store import DISK_POOL, SimStore
from tests.simulation.fleet.watching import watching
from tests.simulation.fleet.wishes import Wish, draw_wish
from tests.simulation.fleet.worker import SimWorker
from tests.simulation.ledger import Ledger, Report
from tests.simulation.loop import SimLoop
from tests.simulation.nemesis import Healing
from tests.simulation.net import SimNet, Weather
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant

SERVE_S: Final = 30.0
WAIT_S: Final = 120.0
CLOSE_S: Final = 60.0
DRAIN_S: Final = 30.0
END_S: Final = 400.0
_NUM_CLIENTS: Final = 5
_ROLES: Final[dict[str, Role]] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
_STORE: Final = "s0"

GENTLE: Final = ("reorder", "split", "slow threads", "aborts", "abort storm", "full pool", "drain")
"""Of these nobody is to blame, and no stream ends in an error of theirs."""
STANDING: Final = ("reorder", "split", "slow threads", "cut", "slow reads", "broken reads", "bit flips")
OF_STORES: Final = ("rot", "full disk", "stuck disk", "bad disk", "forging store")
MALICE: Final = ("forging store", "impostor")
DEALT: Final = (
    *("abort storm", "full pool", "drain", "delay", "partition", "kill", "vanish", "pause", "clock jump"),
    *OF_STORES[:-1],
)
USERS: Final = ("aborts",)
BLOWS: Final = ("drain", "partition", "kill", "vanish", "pause", "clock jump")
"""What may take a worker from everybody. After one of them there is another worker, so nobody hears an error."""
RESTARTS: Final = ("reorder", "kill", "vanish", "drain")
"""All that befalls the world `restarts`, one on the heels of the other."""

AROUND_ROUTERS: Final = (*GENTLE, *USERS, "delay", "partition", "kill", "vanish", "pause", *OF_REDIS)
"""What may befall the world `routers` beside the faults of these, in seeds that are not gentle."""


_PAUSE_S: Final = {"fleet": 2.0, "routers": 2.0, "restarts": 0.8}
"""Between two faults, at most."""


def simulate(plan: Plan) -> Report:
    """Run one plan to its verdict."""
    world = FleetWorld(plan)
    return _verdict(world, world.main(), END_S)


def simulate_idle(idle_s: float) -> Report:
    """Run a fleet to which nothing happens, and that nobody asks anything for so long."""
    world = FleetWorld(Plan(0, "fleet", only=frozenset()))
    return _verdict(world, world.idle(idle_s), idle_s + END_S)


def _verdict(world: FleetWorld, run: Coroutine[Any, Any, None], end_s: float) -> Report:
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
        self.is_gentle = plan.world != "restarts" and draw.random() < (0.5 if plan.world == "routers" else 0.3)
        drawn = self._draw_mix(draw)
        self._dealt = [kind for kind in drawn if kind in (*DEALT, *OF_REDIS, *OF_ROUTERS, *MALICE)]
        self.mix = frozenset(kind for kind in drawn if self.does(kind))
        self.faults.update((self.mix & set(STANDING)) - {"cut"})
        self.loop = SimLoop(draw.getrandbits(64), shuffles="reorder" in self.mix)
        self.net = SimNet(self.loop)
        self.orders = OrderNet(self.loop, self.net)
        self.healing = Healing(self.loop)
        self.redis = RedisHost(self)
        self.workers: dict[str, SimWorker] = {}
        self.stores: dict[str, SimStore] = {}
        self.directory = Path()
        self.is_ending = False
        self._leavers: set[str] = set()  # names and incarnations
        self._first: SimWorker | None = None
        self._switchboard = Switchboard()
        self._num_starts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._clients: dict[Client, None] = {}
        self._blows: list[float] = []
        slow_s, broken = draw.choice([0.1, 0.5]), 0.05 if "broken reads" in self.mix else 0.0
        self._read_faults = Faults(
            max_delay_s=slow_s if "slow reads" in self.mix else 0.002,
            stall=broken,
            fail=broken,
            cut=broken,
            corrupt=0.1 if "bit flips" in self.mix else 0.0,
        )
        self.net.weather.split = 0.3 if "split" in self.mix else 0.0
        self.net.weather.cut = 0.2 if "cut" in self.mix else 0.0

    def unix_s(self) -> float:
        """Unix time."""
        return 1e9 + self.loop.time()

    def _draw_mix(self, draw: random.Random) -> list[str]:
        if self.plan.world == "restarts":
            return list(RESTARTS)
        if self.plan.world == "routers":
            swarm = self.plan.stream("routers")
            own = [kind for kind in OF_ROUTERS if swarm.random() < 0.5]
            return [*own, *(kind for kind in (GENTLE if self.is_gentle else AROUND_ROUTERS) if draw.random() < 0.4)]
        if self.is_gentle:
            return [kind for kind in GENTLE if draw.random() < 0.4]
        drawn = [kind for kind in dict.fromkeys((*STANDING, *DEALT, *USERS)) if draw.random() < 0.4]
        for name, kinds in (("redis", OF_REDIS), ("malice", MALICE)):
            swarm = self.plan.stream(name)
            drawn += [kind for kind in kinds if swarm.random() < 0.3]
        return drawn

    # ---- for the processes ----

    def make_transport(self, memory: BlockMemory, name: str) -> MemoryTransport:
        seed = self.plan.stream(f"transport {name}").getrandbits(32)
        return MemoryTransport(memory, self._switchboard, self._read_faults, seed)

    def holders(self) -> list[tuple[str, SimWorker | SimStore]]:
        return [*self.workers.items(), *self.stores.items()]

    def alarm(self, what: str, whom: str = "") -> None:
        """Somebody is blamed, or a deadline has passed. Who leaves does not answer for ever."""
        self.reach(what.partition(":")[0])
        if self.is_gentle and whom not in self._leavers:
            self.report(Invariant.NO_FALSE_ALARM, what)

    def num_blows_since(self, since_s: float) -> int:
        """How many workers may have been out of reach since."""
        return sum(each >= since_s for each in self._blows)

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
        await self._deal()
        self._stop_faults()
        await self._see_it_serve()
        self.is_ending = True
        if not await self.comes_true(lambda: not self.router.num_live, WAIT_S):
            self.report(Invariant.WAITS_END, f"{self.router.num_live} requests have not ended after {WAIT_S} s")
        await self.comes_true(lambda: not any(each.is_leaving for _, each in self.holders()), CLOSE_S)
        await self._close()

    async def idle(self, idle_s: float) -> None:
        """Nobody asks anything for so long; then all requests that come at once are served at once."""
        await self._open()
        await asyncio.sleep(idle_s)
        self.judge(Invariant.SERVES_AGAIN)
        said = await self._send_some("first")
        if set(said) != {"whole"}:
            self.report(Invariant.SERVES_AGAIN, f"after {idle_s} s of rest: {said}")
        await self._close()

    async def _open(self) -> None:
        for name in (*_ROLES, _STORE):
            self._start(name)
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
        self._clients[client] = None
        try:
            return await self.router.serve(client)
        finally:
            del self._clients[client]

    def _ended(self, how: str) -> None:
        self.reach(f"ended: {how.partition(':')[0]}")
        self.judge(Invariant.WAITS_END)
        if self.is_gentle:
            self.judge(Invariant.NO_FALSE_ALARM)
        if how.startswith("error"):
            self.alarm(f"stream in error: {how}")

    async def _see_it_serve(self) -> None:
        """Requests of the kind that everybody sends are served, now that nothing fails."""
        since_s = self.loop.time()
        for number in itertools.count():
            said = await self._send_some(f"last-{number}")
            self.judge(Invariant.SERVES_AGAIN)
            if set(said) == {"whole"}:
                return
            if self.loop.time() >= since_s + SERVE_S:
                self.report(Invariant.SERVES_AGAIN, f"{SERVE_S} s after the last fault: {said}")
                return
            await asyncio.sleep(0.5)

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

    # ---- life and death, and the nemesis ----

    def _start(self, name: str) -> None:
        self._num_starts[name] += 1
        if self._num_starts[name] > 1:
            self.reach("restarted")
        self.net.back(name)
        started: SimWorker | SimStore
        incarnation = f"{self._num_starts[name]:04d}-{name}"  # no two processes have the same
        if name == _STORE:
            # As a node learns its layout from any worker, though none may be up now.
            self._first = self._first or next(iter(self.workers.values()))
            started = self.stores[name] = SimStore(self, name, incarnation, self._first, self.directory / name)
        else:
            started = self.workers[name] = SimWorker(self, name, _ROLES[name], incarnation)
        started.threads.max_delay_s = 0.2 if "slow threads" in self.mix else 0.01
        self.within(started.process, started.start())

    def _kill(self, name: str, silently: bool) -> None:
        worker = self.stores.pop(name) if name == _STORE else self.workers.pop(name)
        if isinstance(worker, SimStore):
            worker.vanish()
        self.loop.kill(worker.process)
        self.net.kill(name, silently)
        self.orders.kill(worker.process, silently)
        self._switchboard.pull_out(worker.transport.descriptor())

    async def _drain(self, worker: SimWorker | SimStore) -> None:
        await self.comes_true(lambda: not worker.num_filled, DRAIN_S)  # it holds blocks in nobody's name
        leaving = self.within(worker.process, worker.leave(DRAIN_S))
        if not await self.comes_true(lambda: worker.process.is_killed or leaving.done(), DRAIN_S + CLOSE_S):
            self.report(Invariant.WAITS_END, f"{worker.process.name} has not left after {DRAIN_S + CLOSE_S} s")
        if not worker.process.is_killed:
            self.reach("left in order")
            self._kill(worker.name, silently=False)
            self._start(worker.name)

    async def _deal(self) -> None:
        for number in itertools.count():
            draw = self.plan.stream(f"deal {number}")
            await asyncio.sleep(draw.uniform(0, _PAUSE_S[self.plan.world]))
            if self.loop.time() >= self.plan.load_s:
                return
            kind = draw.choice(self._dealt) if self._dealt else None
            if kind in self.mix and self.does(f"deal {number}"):
                if kind in OF_REDIS:
                    self._deal_redis(kind, draw)
                elif kind in OF_ROUTERS:
                    self._deal_router(kind, draw)
                else:
                    self._deal_one(kind, draw)

    def _deal_redis(self, kind: str, draw: random.Random) -> None:
        if self.redis.is_up:
            lasts_s, other = draw.uniform(0.2, 9.0), draw.choice([*_ROLES, _STORE, *self.router.names])
            self.faults[kind] += 1
            self.story.append(f"{self.loop.time():.3f} s: {kind} ({other}, {lasts_s:.1f} s)")
            self.redis.fail(kind, lasts_s, draw.random() < 0.5, other)

    def _deal_router(self, kind: str, draw: random.Random) -> None:
        lasts_s, name = draw.uniform(0.2, 9.0), draw.choice(ROUTERS)
        if isinstance(self.router, Routers) and self.router.fail(kind, lasts_s, name):
            self.faults[kind] += 1
            self.story.append(f"{self.loop.time():.3f} s: {kind} ({name}, {lasts_s:.1f} s)")

    def _deal_one(self, kind: str, draw: random.Random) -> None:
        here = dict(self.holders())
        upright = [name for name in (*_ROLES, _STORE) if name in here and not here[name].process.is_paused]
        if kind in OF_STORES or (self.is_gentle and kind != "abort storm"):
            upright = [name for name in upright if (name == _STORE) == (kind in OF_STORES)]
        if len(upright) < (1 if kind in OF_STORES else 3):
            return
        name = draw.choice(upright)
        worker, lasts_s = here[name], draw.uniform(0.2, 9.0)
        self.faults[kind] += 1
        if kind in BLOWS:
            self._blows.append(self.loop.time())
        self.story.append(f"{self.loop.time():.3f} s: {kind} ({worker.process.name}, {lasts_s:.1f} s)")
        match kind:
            case "delay":
                self.net.weather.max_latency_s = draw.choice([0.05, 0.3])
                self.healing.later(lasts_s, self._calm)
            case "partition":
                other = draw.choice([each for each in (*_ROLES, _STORE, *self.router.names) if each != name])
                self.net.part(name, other)
                self.healing.later(lasts_s, lambda: self.net.join(name, other))
            case "kill" | "vanish":
                self._kill(name, silently=kind == "vanish")
                self.healing.later(lasts_s / 3, lambda: self._start(name))
            case "drain":
                # Never the last of its kind: that is another fault.
                others = [each for each in here.values() if each.role == worker.role and each is not worker]
                if not any(each.is_leaving for each in (worker, *others)):
                    worker.is_leaving = True
                    self._leavers |= {worker.name, worker.incarnation}
                    self.within(self.loop.world, self._drain(worker))
            case "pause":
                self.loop.pause(worker.process)
                self.healing.later(lasts_s, lambda: self.loop.resume(worker.process))
            case "clock jump":
                worker.process.clock_ahead_s += draw.choice([1.0, 7.0, 100.0])
            case "full pool" if isinstance(worker, SimWorker):
                self.within(worker.process, self._fill(worker, lasts_s, draw))
            case "forging store" if isinstance(worker, SimStore):
                worker.forge()
                self.healing.later(lasts_s, worker.stop_forging)
            case "rot" if isinstance(worker, SimStore):
                worker.rot(draw)
            case "stuck disk" if isinstance(worker, SimStore):
                worker.threads.stuck.add(DISK_POOL)
                self.healing.later(lasts_s, lambda: worker.threads.stuck.discard(DISK_POOL))
            case "full disk" | "bad disk" if isinstance(worker, SimStore):
                what = "is_full" if kind == "full disk" else "is_failing"
                setattr(worker.disk, what, True)
                self.healing.later(lasts_s, lambda: setattr(worker.disk, what, False))
            case "impostor":
                assert self._first is not None
                work = intrude(self, draw.choice(list(_ROLES)), self._first.engine.layout, worker.record.kv_address)
                self.within(self.loop.new_process(f"x/{self.faults[kind]}"), work)
            case "abort storm":
                for client in self._clients:
                    client.leave()

    async def _fill(self, worker: SimWorker, lasts_s: float, draw: random.Random) -> None:
        """Hold much of a worker's pool for a while."""
        engine, thread = worker.engine, worker.parts.thread
        hashes = [BlockHash(draw.randbytes(16)) for _ in range(max(0, engine.load().num_free_blocks - 2))]
        room = await thread.call(engine.take_prefix, hashes)
        if room is not None:
            worker.num_filled += 1
            await asyncio.sleep(min(lasts_s, 2.0))
            await thread.call(engine.release_blocks, room.block_ids)
            worker.num_filled -= 1

    def _calm(self) -> None:
        self.net.weather.max_latency_s = Weather.max_latency_s

    def _stop_faults(self) -> None:
        self.healing.now()
        self.net.weather = Weather()
        for _, each in self.holders():
            each.transport.faults = Faults()
