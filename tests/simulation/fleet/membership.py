"""The registry as everybody sees it: who is registered, a little late; and the index, as late as that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from kvstore.block import BlockHash
from kvstore.index import Holding
from kvstore.registry import WorkerRecord

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

LEASE_S: Final = 5.0
_OnChange = Callable[[tuple[WorkerRecord, ...]], None]


class SimRegistry:
    """The records. Those of a process that is gone stay until its lease ends."""

    def __init__(self, world: FleetWorld) -> None:
        self._world = world
        self._records: dict[str, WorkerRecord] = {}
        self.members: list[SimMembership] = []

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        return tuple(self._records[name] for name in sorted(self._records))

    def announce(self, record: WorkerRecord) -> None:
        self._records[record.worker_id] = record
        self._tell(0.1)

    def withdraw(self, record: WorkerRecord, after_s: float = 0.0) -> None:
        """Forget a process, unless another start of it has registered since."""

        def forget() -> None:
            if self._records.get(record.worker_id, record).incarnation == record.incarnation:
                self._records.pop(record.worker_id, None)
                self._tell(0.1)

        with self._world.loop.within(self._world.loop.world):
            self._world.loop.call_later(after_s, forget)

    def _tell(self, within_s: float) -> None:
        for member in self.members:
            with self._world.loop.within(member.process):
                self._world.loop.call_later(self._world.loop.random.uniform(0, within_s), member.hear)


class SimMembership:
    """`Membership` of one process."""

    connected = True

    def __init__(self, world: FleetWorld) -> None:
        self.process = world.loop.process
        self._registry = world.registry
        self._listeners: list[_OnChange] = []
        self._heard: tuple[WorkerRecord, ...] = ()
        world.registry.members.append(self)

    def on_change(self, listener: _OnChange) -> None:
        self._listeners.append(listener)

    async def start(self) -> None:
        self.hear()

    async def close(self) -> None:
        self._registry.members.remove(self)

    def snapshot(self) -> tuple[WorkerRecord, ...]:
        return self._heard

    def starting(self) -> tuple[WorkerRecord, ...]:
        return ()

    def hear(self) -> None:
        """What the registry has now."""
        self._heard = self._registry.records
        for listener in self._listeners:
            listener(self._heard)


class SimIndex:
    """Who holds how much of a prefix, as of some moments ago."""

    available = True

    def __init__(self, world: FleetWorld) -> None:
        self._world = world
        self._seen: dict[str, tuple[str, frozenset[BlockHash]]] = {}

    def look(self) -> None:
        """Take down what everybody holds."""
        self._seen = {name: (each.incarnation, frozenset(each.held())) for name, each in self._world.holders()}

    async def lookup(self, hashes: Sequence[BlockHash], timeout_s: float) -> list[Holding]:
        found = []
        for holder_id, (incarnation, held) in self._seen.items():
            num_blocks = next((n for n, each in enumerate(hashes) if each not in held), len(hashes))
            if num_blocks:
                tiers = (0, 0, num_blocks, 0) if holder_id.startswith("s") else (num_blocks, 0, 0, 0)
                found.append(Holding(holder_id, incarnation, num_blocks, tiers))
        return found
