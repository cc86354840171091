"""The fleet's Redis: the model behind a simulated port, its faults, and the clocks and names of its clients.

The clients are the product's: `Registrar`, `Membership`, `IndexWriter` with its feeds, `IndexReader`. They reach it by
redis-py over the simulated network, so it may be slow, cut off, parted from somebody, stuck, emptied, set back to what
it was, or gone and back empty.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final
from unittest import mock

from kvstore.index import reader, writer
from kvstore.index import session as index_session
from kvstore.registry import registry
from tests.simulation.loop import Process
from tests.simulation.redis_model.keyspace import Keyspace
from tests.simulation.redis_model.server import ModelRedis

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

HOST: Final = "redis"
PORT: Final = 6379
PASSWORD: Final = "sesame"
REDIS_URL: Final = f"redis://:{PASSWORD}@{HOST}:{PORT}/0"
LEASE_S: Final = 5.0
FAULTS: Final = (
    "redis slow",
    "redis cut",
    "redis parted",
    "redis stuck",
    "redis flushed",
    "redis set back",
    "redis killed",
)
_DUMP_EVERY_S: Final = 4.0


class RedisHost:
    """One Redis after the other, at one address."""

    process: Process
    server: ModelRedis

    def __init__(self, world: FleetWorld) -> None:
        self._world = world
        self._num_starts = 0
        self._slowness_s = 0.0
        self._dump: Keyspace | None = None
        self.start()
        with world.loop.within(world.loop.world):
            world.loop.call_later(_DUMP_EVERY_S, self._save)

    def start(self, content: Keyspace | None = None) -> None:
        """Begin to listen, empty or with what a dump has."""
        self._num_starts += 1
        self.process = self._world.loop.new_process(f"{HOST}/{self._num_starts}")
        with self._world.loop.within(self.process):
            self.server = ModelRedis(self._world.unix_s, self._num_starts, PASSWORD, self._pause, content)
            self._world.net.back(HOST)
            self._world.net.of(HOST, self.process).listen_for_bytes(PORT, self.server.serve)

    def fail(self, kind: str, lasts_s: float, silently: bool, other: str) -> None:
        """Have one of `FAULTS`, for so long where it lasts. `other`: whom it is parted from."""
        world = self._world
        match kind:
            case "redis slow":
                self._slowness_s = 0.4
                world.healing.later(lasts_s, self._speed_up)
            case "redis cut":
                self.server.drop_clients()
            case "redis parted":
                world.net.part(HOST, other)
                world.healing.later(lasts_s, lambda: world.net.join(HOST, other))
            case "redis stuck":
                stuck = self.process
                world.loop.pause(stuck)
                world.healing.later(lasts_s, lambda: world.loop.resume(stuck))
            case "redis flushed":
                self.server.keyspace.run(b"FLUSHALL", [])
            case "redis set back":
                self._kill(silently=False)
                self.start(self._dump)
            case "redis killed":
                self._kill(silently)
                world.healing.later(lasts_s / 3, self.start)

    @property
    def is_up(self) -> bool:
        return not self.process.is_killed and not self.process.is_paused

    def _kill(self, silently: bool) -> None:
        self._world.loop.kill(self.process)
        self._world.net.kill(HOST, silently)

    def _save(self) -> None:
        if not self.process.is_killed:
            self._dump = self.server.keyspace.copy()
        self._world.loop.call_later(_DUMP_EVERY_S, self._save)

    def _speed_up(self) -> None:
        self._slowness_s = 0.0

    async def _pause(self) -> None:
        if self._slowness_s:
            await asyncio.sleep(self._world.loop.random.uniform(0, self._slowness_s))


@contextlib.contextmanager
def seeded_clients(world: FleetWorld) -> Iterator[None]:
    """Clients of Redis go by the loop's time, and draw their names from the seed."""
    clock, draw = SimpleNamespace(monotonic=world.loop.time), world.plan.stream("tokens")
    names = SimpleNamespace(token_hex=lambda num_bytes: draw.randbytes(num_bytes).hex())
    with contextlib.ExitStack() as stack:
        for module in (reader, writer, index_session, registry):
            stack.enter_context(mock.patch.object(module, "time", clock))
        stack.enter_context(mock.patch.object(index_session, "secrets", names))
        yield
