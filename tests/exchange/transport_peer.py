"""One end of the transport contract suite: a pool, a transport, and the few things that a test can ask of them.

For transports with native code it is a process of its own, `python -m tests.exchange.transport_peer NAME PORT PIECES`,
and takes its orders over a socket: a crash in there is a failed test and not a lost test run.
"""

import asyncio
import os
import sys
from typing import Any

import msgspec
import numpy as np

from kvstore.block import BlockMemory
from kvstore.errors import TransportError
from kvstore.transport import Link, LinkPeer, Transport
from kvstore.transport.base import Run
from kvstore.transport.devices import confine_ucx
from tests.pieces import host_memory, read_all, write_all

NUM_BLOCKS = 320
BLOCK_BYTES = 18 * 1024  # in 24 pieces: less than a row of sums each


def content(seed: int) -> np.ndarray:
    """The pool that `fill(seed)` makes."""
    return np.random.default_rng(seed).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)


class TransportPeer:
    """Every public coroutine is an order. Links have names; `num_pieces` is what its blocks lie in."""

    def __init__(self, make_transport: Any, num_pieces: int = 1) -> None:
        self.memory = host_memory(num_pieces, NUM_BLOCKS, BLOCK_BYTES)
        self.transport: Transport = make_transport(self.memory)
        self._links: dict[str, Link] = {}

    async def start(self) -> bool:
        await self.transport.start()
        return self.transport.two_sided

    async def descriptor(self) -> bytes:
        return self.transport.descriptor()

    async def lane_to(self, descriptor: bytes) -> str | None:
        return self.transport.lane_to(descriptor)

    async def connect(self, name: str, descriptor: bytes, link_id: bytes, dialled: bool) -> str:
        peer = LinkPeer(name, descriptor, link_id, "127.0.0.1", dialled, lane="")
        self._links[name] = await self.transport.connect(peer)
        return self._links[name].lane

    async def give_up_connecting(self, descriptor: bytes, link_id: bytes, after_s: float) -> None:
        """Connect, and close the link where that took less time."""
        try:
            async with asyncio.timeout(after_s):
                link = await self.transport.connect(
                    LinkPeer("given up", descriptor, link_id, "127.0.0.1", True, lane="")
                )
        except (TimeoutError, TransportError):
            return
        await link.close()

    async def num_sockets(self) -> int:
        return _num_sockets()

    async def read(self, name: str, read_id: int, runs: list[list[int]]) -> None:
        await self._links[name].read(read_id, [Run(*run) for run in runs])

    async def serve(self, name: str, read_id: int, runs: list[list[int]]) -> None:
        await self._links[name].serve(read_id, [(run[0], run[2]) for run in runs])

    async def abort(self, name: str) -> None:
        self._links[name].abort("the test says so")

    async def close_link(self, name: str) -> None:
        await self._links[name].close()

    async def fill(self, seed: int) -> None:
        write_all(self.memory, content(seed))

    async def poison(self, value: int) -> None:
        write_all(self.memory, np.full((NUM_BLOCKS, BLOCK_BYTES), value, np.uint8))

    async def blocks(self) -> bytes:
        return read_all(self.memory).tobytes()

    async def close(self) -> None:
        await self.transport.close()


def _num_sockets() -> int:
    files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(file) and os.readlink(file).startswith("socket:") for file in files)


def _make_ucxx(memory: BlockMemory) -> Transport:
    from kvstore.transport.ucxx import UcxxTransport

    return UcxxTransport(memory, "127.0.0.1")


def _make_nixl(memory: BlockMemory) -> Transport:
    from kvstore.transport.nixl import NixlTransport

    return NixlTransport(memory, "test")


async def _obey(name: str, port: int, num_pieces: int) -> None:
    confine_ucx("127.0.0.1")
    peer = TransportPeer({"ucxx": _make_ucxx, "nixl": _make_nixl}[name], num_pieces)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    tasks: set[asyncio.Task[None]] = set()

    async def carry_out(number: int, order: str, arguments: list[Any]) -> None:
        try:
            answer, problem = await getattr(peer, order)(*arguments), None
        except TransportError as error:
            answer, problem = None, str(error)
        except Exception as error:
            answer, problem = None, f"NOT A TRANSPORT ERROR: {error!r}"
        body = msgspec.msgpack.encode((number, answer, problem))
        writer.write(len(body).to_bytes(4, "big") + body)

    while True:
        try:
            size = int.from_bytes(await reader.readexactly(4), "big")
            number, order, arguments = msgspec.msgpack.decode(await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            break  # the test has closed its end, perhaps with answers of ours unread
        task = asyncio.ensure_future(carry_out(number, order, arguments))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    await peer.close()
    writer.close()


if __name__ == "__main__":
    asyncio.run(_obey(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
