"""What befalls a small fleet: which kinds of fault a seed has, when they are dealt, and how each ends."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from typing import TYPE_CHECKING, Final

from kvstore.block import BlockHash
from tests.memory_transport import Faults
from tests.simulation.fleet import elastic
from tests.simulation.fleet.elastic import KINDS as OF_ELASTIC
from tests.simulation.fleet.impostor import intrude
from tests.simulation.fleet.redis_host import FAULTS as OF_REDIS
from tests.simulation.fleet.router import SimRouter
from tests.simulation.fleet.routers import FAULTS as OF_ROUTERS
from tests.simulation.fleet.routers import NAMES as ROUTERS
from tests.simulation.fleet.routers import Routers
from tests.simulation.fleet.store import DISK_POOL, SimStore
from tests.simulation.fleet.worker import STORE, SimWorker
from tests.simulation.net import Weather

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

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
"""What may take a worker from everybody. While another one of its role is there nobody hears an error."""
RESTARTS: Final = ("reorder", "kill", "vanish", "drain")
"""All that befalls the world `restarts`, one on the heels of the other."""

AROUND_ROUTERS: Final = (*GENTLE, *USERS, "delay", "partition", "kill", "vanish", "pause", *OF_REDIS)
"""What may befall the world `routers` beside the faults of these, in seeds that are not gentle."""


_BACK_S: Final = 8.0
"""Until who is back has been found by everybody."""
_PAUSE_S: Final = {"fleet": 2.0, "routers": 2.0, "restarts": 0.8, "elastic": 1.0}
"""Between two faults, at most."""


class FleetNemesis:
    """`mix`: the kinds of fault that this run has. `is_gentle`: of none of them anybody is to blame."""

    def __init__(self, world: FleetWorld, draw: random.Random) -> None:
        self._world = world
        self._decode = [name for name, role in world.roles.items() if role != "prefill"]
        plan = world.plan
        self.is_gentle = plan.world != "restarts" and draw.random() < (0.5 if plan.world == "routers" else 0.3)
        drawn = self._draw_mix(draw)
        self._dealt = [kind for kind in drawn if kind in (*DEALT, *OF_REDIS, *OF_ROUTERS, *MALICE, *OF_ELASTIC)]
        self.mix = frozenset(kind for kind in drawn if world.does(kind))
        self.leavers: set[str] = set()
        """Names and incarnations of those who leave in order."""
        self._away: list[tuple[str, float, float]] = []  # who was out of reach, from when until when
        self._deaths: list[float] = []  # of decode workers
        self._redis_away: list[tuple[float, float]] = []  # from somebody
        self.redirects_until_s = 0.0
        """Until when the requests of an elastic fleet are redirected at random."""
        world.faults.update((self.mix & set(STANDING)) - {"cut"})

    def num_deaths_since(self, since_s: float) -> int:
        """How many decode workers have died since."""
        return sum(each >= since_s for each in self._deaths)

    def was_nobody_there(self, since_s: float) -> bool:
        """Whether at some time since all decode workers were out of reach, or had not been back for long."""
        moments = [since_s, *(begin for _, begin, _ in self._away if begin > since_s)]
        return any(
            all(
                any(each == name and begin <= moment <= self._found_by_s(end) for each, begin, end in self._away)
                for name in self._decode
            )
            for moment in moments
        )

    def _found_by_s(self, back_s: float) -> float:
        """When one that is back has been found by everybody: not while Redis is away, which says where it is."""
        for begin, end in self._redis_away:
            if begin <= back_s + _BACK_S and end >= back_s:
                back_s = max(back_s, end)
        return back_s + _BACK_S

    def back(self, name: str) -> None:
        """A new start of it is there."""
        now_s = self._world.loop.time()
        self._away = [(each, begin, min(end, now_s) if each == name else end) for each, begin, end in self._away]

    def _note(self, kind: str, name: str, other: str, lasts_s: float) -> None:
        """Who is out of reach from now on."""
        now_s = self._world.loop.time()
        ends_s = {
            "drain": math.inf,
            "kill": math.inf,
            "vanish": math.inf,
            "pause": now_s + lasts_s,
            "clock jump": now_s,
        }
        if kind == "partition" and other not in self._world.router.names:
            return
        self._away.append((name, now_s, ends_s.get(kind, now_s + lasts_s)))
        if kind in ("kill", "vanish") and name in self._decode:
            self._deaths.append(now_s)

    def draw_read_faults(self, draw: random.Random) -> Faults:
        slow_s, broken = draw.choice([0.1, 0.5]), 0.05 if "broken reads" in self.mix else 0.0
        return Faults(
            max_delay_s=slow_s if "slow reads" in self.mix else 0.002,
            stall=broken,
            fail=broken,
            cut=broken,
            corrupt=0.1 if "bit flips" in self.mix else 0.0,
        )

    def weather(self) -> Weather:
        return Weather(split=0.3 if "split" in self.mix else 0.0, cut=0.2 if "cut" in self.mix else 0.0)

    def _draw_mix(self, draw: random.Random) -> list[str]:
        plan = self._world.plan
        if plan.world == "restarts":
            return list(RESTARTS)
        if plan.world == "routers":
            swarm = plan.stream("routers")
            own = [kind for kind in OF_ROUTERS if swarm.random() < 0.5]
            return [*own, *(kind for kind in (GENTLE if self.is_gentle else AROUND_ROUTERS) if draw.random() < 0.4)]
        if plan.world == "elastic":
            swarm = plan.stream("elastic")
            own = [kind for kind in OF_ELASTIC if swarm.random() < 0.7]
            return [*own, *self._draw_faults(draw)]
        return self._draw_faults(draw)

    def _draw_faults(self, draw: random.Random) -> list[str]:
        """Those that befall any fleet."""
        plan = self._world.plan
        if self.is_gentle:
            return [kind for kind in GENTLE if draw.random() < 0.4]
        drawn = [kind for kind in dict.fromkeys((*STANDING, *DEALT, *USERS)) if draw.random() < 0.4]
        for name, kinds in (("redis", OF_REDIS), ("malice", MALICE)):
            swarm = plan.stream(name)
            drawn += [kind for kind in kinds if swarm.random() < 0.3]
        return drawn

    async def deal(self) -> None:
        world = self._world
        for number in itertools.count():
            draw = world.plan.stream(f"deal {number}")
            await asyncio.sleep(draw.uniform(0, _PAUSE_S[world.plan.world]))
            if world.loop.time() >= world.plan.load_s:
                return
            kind = draw.choice(self._dealt) if self._dealt else None
            if kind in self.mix and world.does(f"deal {number}"):
                if kind in OF_REDIS:
                    self._deal_redis(kind, draw)
                elif kind in OF_ELASTIC:
                    assert isinstance(world.router, SimRouter)
                    elastic.deal(world, world.router, kind, draw)
                elif kind in OF_ROUTERS:
                    self._deal_router(kind, draw)
                else:
                    self._deal_one(kind, draw)

    def _deal_redis(self, kind: str, draw: random.Random) -> None:
        world = self._world
        if world.redis.is_up:
            lasts_s, other = draw.uniform(0.2, 9.0), draw.choice([*world.roles, STORE, *world.router.names])
            world.faults[kind] += 1
            self._redis_away.append((world.loop.time(), world.loop.time() + lasts_s))
            world.story.append(f"{world.loop.time():.3f} s: {kind} ({other}, {lasts_s:.1f} s)")
            world.redis.fail(kind, lasts_s, draw.random() < 0.5, other)

    def _deal_router(self, kind: str, draw: random.Random) -> None:
        world = self._world
        lasts_s, name = draw.uniform(0.2, 9.0), draw.choice(ROUTERS)
        if isinstance(world.router, Routers) and world.router.fail(kind, lasts_s, name):
            world.faults[kind] += 1
            world.story.append(f"{world.loop.time():.3f} s: {kind} ({name}, {lasts_s:.1f} s)")

    def _deal_one(self, kind: str, draw: random.Random) -> None:
        world = self._world
        here = dict(world.holders())
        upright = [name for name in (*world.roles, STORE) if name in here and not here[name].process.is_paused]
        if kind in OF_STORES or (self.is_gentle and kind != "abort storm"):
            upright = [name for name in upright if (name == STORE) == (kind in OF_STORES)]
        if len(upright) < (1 if kind in OF_STORES else 3):
            return
        name = draw.choice(upright)
        worker, lasts_s = here[name], draw.uniform(0.2, 9.0)
        world.faults[kind] += 1
        others = [each for each in (*world.roles, STORE, *world.router.names) if each != name]
        other = draw.choice(others) if kind == "partition" else ""
        if kind in BLOWS:
            self._note(kind, name, other, lasts_s)
        world.story.append(f"{world.loop.time():.3f} s: {kind} ({worker.process.name}, {lasts_s:.1f} s)")
        match kind:
            case "delay":
                world.net.weather.max_latency_s = draw.choice([0.05, 0.3])
                world.healing.later(lasts_s, self._calm)
            case "partition":
                world.net.part(name, other)
                world.healing.later(lasts_s, lambda: world.net.join(name, other))
            case "kill" | "vanish":
                world.kill(name, silently=kind == "vanish")
                world.healing.later(lasts_s / 3, lambda: world.start(name))
            case "drain":
                # Never the last of its kind: that is another fault.
                others = [each for each in here.values() if each.role == worker.role and each is not worker]
                if not any(each.is_leaving for each in (worker, *others)):
                    self.drain(worker)
            case "pause":
                world.loop.pause(worker.process)
                world.healing.later(lasts_s, lambda: world.loop.resume(worker.process))
            case "clock jump":
                worker.process.clock_ahead_s += draw.choice([1.0, 7.0, 100.0])
            case "full pool" if isinstance(worker, SimWorker) and not worker.is_leaving:
                world.within(worker.process, self._fill(worker, lasts_s, draw))
            case "forging store" if isinstance(worker, SimStore):
                worker.forge()
                world.healing.later(lasts_s, worker.stop_forging)
            case "rot" if isinstance(worker, SimStore):
                worker.rot(draw)
            case "stuck disk" if isinstance(worker, SimStore):
                worker.threads.stuck.add(DISK_POOL)
                world.healing.later(lasts_s, lambda: worker.threads.stuck.discard(DISK_POOL))
            case "full disk" | "bad disk" if isinstance(worker, SimStore):
                what = "is_full" if kind == "full disk" else "is_failing"
                setattr(worker.disk, what, True)
                world.healing.later(lasts_s, lambda: setattr(worker.disk, what, False))
            case "impostor":
                assert world.first is not None
                work = intrude(
                    world, draw.choice(list(world.roles)), world.first.engine.layout, worker.record.kv_address
                )
                world.within(world.loop.new_process(f"x/{world.faults[kind]}"), work)
            case "abort storm":
                for client in world.clients:
                    client.leave()

    def drain(self, worker: SimWorker | SimStore) -> None:
        """Have it leave in order, and come back."""
        worker.is_leaving = True
        self.leavers |= {worker.name, worker.incarnation}
        self._world.within(self._world.loop.world, self._world.drain(worker))

    async def _fill(self, worker: SimWorker, lasts_s: float, draw: random.Random) -> None:
        """Hold much of a worker's pool for a while."""
        engine, thread = worker.engine, worker.parts.thread
        hashes = [BlockHash(draw.randbytes(16)) for _ in range(max(0, engine.load().num_free_blocks - 2))]
        worker.num_filled += 1  # it does not leave meanwhile
        room = await thread.call(engine.take_prefix, hashes)
        if room is not None:
            await asyncio.sleep(min(lasts_s, 2.0))
            await thread.call(engine.release_blocks, room.block_ids)
        worker.num_filled -= 1

    def _calm(self) -> None:
        self._world.net.weather.max_latency_s = Weather.max_latency_s

    def stop(self) -> None:
        """End all faults."""
        self._world.healing.now()
        self._world.net.weather = Weather()
        self._world.read_faults = Faults()  # of those that start from now on
        for _, each in self._world.holders():
            each.transport.faults = Faults()
