"""Draws a seed's mix of faults, and deals them while a run lasts."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from tests.memory_transport import Faults
from tests.simulation.loop import SimLoop
from tests.simulation.net import Weather
from tests.simulation.node import Habits, Node
from tests.simulation.pool import BLOCK_BYTES

if TYPE_CHECKING:
    from tests.simulation.world import World

STANDING: Final = ("reorder", "split", "cut", "slow reads", "broken reads", "bit flips", "slow threads", "old records")
"""Faults of a whole run: they count once a seed, cuts each."""
DEALT: Final = (
    "delay",
    "partition",
    "kill",
    "vanish",
    "restart",
    "pause",
    "clock jump",
    "rot",
    "full pool",
    "abort storm",
)
USERS: Final = ("aborts", "revokes")


class Healing:
    """The ends of faults that go on: each comes after a while, or when all faults end."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._ends: list[Callable[[], None]] = []

    def later(self, delay_s: float, end: Callable[[], None]) -> None:
        def once() -> None:
            if once in self._ends:
                self._ends.remove(once)
                end()

        self._ends.append(once)
        self._loop.call_later(delay_s, once)

    def now(self) -> None:
        """End all."""
        for end in list(self._ends):
            end()


class Nemesis:
    """`mix`: the kinds of fault that this run has."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.is_over = False
        draw = world.plan.stream("mix")
        drawn = [kind for kind in (*STANDING, *DEALT, *USERS) if draw.random() < world.size.share]
        self._dealt = [kind for kind in drawn if kind in DEALT]
        self.mix = frozenset(kind for kind in drawn if world.does(kind))
        world.faults.update(dict.fromkeys((self.mix & set(STANDING)) - {"cut"}, 1))

    async def deal(self) -> None:
        """Deal faults until the load is over."""
        world = self._world
        for number in itertools.count():
            draw = world.plan.stream(f"deal {number}")
            await asyncio.sleep(draw.uniform(0, world.size.pause_s))
            if world.loop.time() >= world.plan.load_s:
                return
            kind = draw.choice(self._dealt) if self._dealt else None
            if kind in self.mix and world.does(f"deal {number}"):
                self._deal_one(kind, draw)

    def _deal_one(self, kind: str, draw: random.Random) -> None:
        """Do one thing, and arrange for its end."""
        world = self._world
        upright = [name for name in world.names if name in world.nodes and not world.nodes[name].process.is_paused]
        if len(upright) < 2:
            return
        name = draw.choice(upright)
        node, lasts_s = world.nodes[name], draw.uniform(0.2, 9.0)
        world.faults[kind] += 1
        world.story.append(f"{world.loop.time():.3f} s: {kind} ({node.process.name}, {lasts_s:.1f} s)")
        match kind:
            case "delay":
                world.net.weather.max_latency_s = draw.choice([0.05, 0.5, 1.5])
                world.healing.later(lasts_s, self._calm)
            case "partition":
                other = draw.choice([each for each in world.names if each != name])
                world.net.part(name, other)
                world.healing.later(lasts_s, lambda: world.net.join(name, other))
            case "kill" | "vanish":
                world.kill(name, silently=kind == "vanish")
                world.healing.later(lasts_s / 3, lambda: world.start(name))
            case "restart":
                if not node.is_leaving:
                    node.is_leaving = True
                    world.keep(world.loop.create_task(world.restart(node), name=f"restart {name}"))
            case "pause":
                world.loop.pause(node.process)
                world.healing.later(lasts_s, lambda: world.loop.resume(node.process))
            case "clock jump":
                node.process.clock_ahead_s += draw.choice([1.0, 7.0, 100.0])
            case "rot":
                held = [node.pool.book.find(each) for each in node.pool.book.hashes()]
                if blocks := [block for block in held if block is not None]:
                    block = draw.choice(blocks)
                    node.pool.flip(block, draw.randrange(BLOCK_BYTES), draw.randrange(8))
            case "full pool":
                ids = node.pool.take(node.pool.book.num_free)
                node.num_busy += 1
                world.healing.later(lasts_s, lambda: self._make_room(node, ids))
            case "abort storm":
                for each in world.nodes.values():
                    with world.loop.within(each.process):
                        for fetch in list(each.live_fetches):
                            each.abort(fetch, "everybody left")

    def _make_room(self, node: Node, ids: Sequence[int]) -> None:
        node.num_busy -= 1
        node.pool.give_back(ids)

    def _calm(self) -> None:
        self._world.net.weather.max_latency_s = Weather.max_latency_s

    def stop(self) -> None:
        """End all faults."""
        self._world.healing.now()
        self._world.net.weather = Weather()
        self.is_over = True
        for node in self._world.nodes.values():
            self.appease(node)

    def appease(self, node: Node) -> None:
        """From now on a node has neither faults nor habits that make trouble."""
        node.transport.faults = Faults()
        node.habits = Habits()
