"""The in-memory transport with both ends at work: a read needs its owner's `serve`, which lasts as long as the read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvstore.block import BlockMemory, Run
from kvstore.errors import ReadFailed
from kvstore.transport.base import LinkPeer
from tests.memory_transport import Faults, MemoryLink, MemoryTransport, Switchboard
from tests.simulation.loop import Process, SimLoop

_SendId = tuple[bytes, int]


class Wire:
    """Which reads are over, and which sends wait for that; of one world."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        self.sends: dict[_SendId, tuple[Process, asyncio.Future[None]]] = {}
        self._ended: set[_SendId] = set()

    def read_ended(self, send_id: _SendId) -> None:
        """The reader touches nothing any more."""
        self._ended.add(send_id)
        self._settle(send_id)

    def serve(self, send_id: _SendId) -> asyncio.Future[None]:
        done = self.loop.create_future()
        self.sends[send_id] = self.loop.process, done
        self._settle(send_id)
        return done

    def _settle(self, send_id: _SendId) -> None:
        if send_id in self._ended and send_id in self.sends:
            process, done = self.sends.pop(send_id)
            with self.loop.within(process):
                self.loop.call_soon(lambda: done.done() or done.set_result(None))


class TwoSidedTransport(MemoryTransport):
    """`MemoryTransport`, whose reads the owner takes part in."""

    two_sided = True
    num_turns: int | None = None

    def __init__(self, memory: BlockMemory, switchboard: Switchboard, faults: Faults, seed: int, wire: Wire) -> None:
        super().__init__(memory, switchboard, faults, seed)
        self._wire = wire

    async def connect(self, peer: LinkPeer) -> _TwoSidedLink:
        return _TwoSidedLink(await super().connect(peer), peer.link_id, self._wire)


class _TwoSidedLink:
    lane = MemoryLink.lane
    num_messages = 0

    def __init__(self, link: MemoryLink, link_id: bytes, wire: Wire) -> None:
        self._link = link
        self._link_id = link_id
        self._wire = wire
        self._sends: dict[_SendId, asyncio.Future[None]] = {}

    def read(self, read_id: int, runs: Sequence[Run], landed: Callable[[], None] | None = None) -> asyncio.Future[None]:
        reading = self._link.read(read_id, runs, landed)
        reading.add_done_callback(lambda _: self._wire.read_ended((self._link_id, read_id)))
        return reading

    def serve(self, read_id: int, runs: Sequence[tuple[int, int]]) -> asyncio.Future[None]:
        send_id = self._link_id, read_id
        sending = self._sends[send_id] = self._wire.serve(send_id)
        sending.add_done_callback(lambda _: self._sends.pop(send_id, None))
        return sending

    def abort(self, reason: str) -> None:
        for send_id, sending in list(self._sends.items()):
            self._wire.sends.pop(send_id, None)
            if not sending.done():
                sending.set_exception(ReadFailed(f"memory: send aborted: {reason}"))
        self._link.abort(reason)

    async def close(self) -> None:
        self.abort("closed")
        await self._link.close()
