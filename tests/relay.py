"""A network between processes that can fail: relays at another loopback address, in a thread of their own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence

FAR_HOST = "127.0.0.2"
"""Where relays listen, on the very ports that they lead to: a process listens on 127.0.0.1 and advertises this."""


class Relays:
    """A context manager. Connections to `FAR_HOST` at one of the ports lead to 127.0.0.1 at the same port."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)
        self._flowing: dict[int, asyncio.Event] = {}
        self._near: dict[int, set[asyncio.StreamWriter]] = {port: set() for port in ports}
        self._writers: list[asyncio.StreamWriter] = []
        self._servers: list[asyncio.Server] = []

    def __enter__(self) -> Relays:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(60)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stall(self, *ports: int) -> None:
        """Nothing comes through any more, either way: neither bytes nor ends of connections, nor new ones."""
        for port in ports:
            self._loop.call_soon_threadsafe(self._flowing[port].clear)

    def heal(self, *ports: int) -> None:
        """All that was held back comes through."""
        for port in ports:
            self._loop.call_soon_threadsafe(self._flowing[port].set)

    def half_open(self, *ports: int) -> None:
        """The near end loses its connections, and the far end hears nothing of that, nor of anything else."""

        def cut() -> None:
            for port in ports:
                self._flowing[port].clear()
                for writer in self._near[port]:
                    writer.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    def forget(self, *ports: int) -> None:
        """All connections that there are lead nowhere from now on, and neither end hears of it; new ones do not.

        So does a firewall or an address translator with a connection that was idle for too long.
        """

        def lose() -> None:
            for port in ports:
                self._flowing[port].clear()
                self._flowing[port] = asyncio.Event()
                self._flowing[port].set()

        self._loop.call_soon_threadsafe(lose)

    async def _start(self) -> None:
        for port in self._ports:
            flowing = self._flowing[port] = asyncio.Event()
            flowing.set()
            self._servers += [
                await asyncio.start_server(
                    lambda reader, writer, port=port: self._relay(port, reader, writer), FAR_HOST, port
                )
            ]

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # then they are closed

    async def _relay(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flowing = self._flowing[port]
        self._writers.append(writer)
        with contextlib.suppress(asyncio.CancelledError):  # `_stop`
            await self._carry(port, flowing, reader, writer)

    async def _carry(
        self, port: int, flowing: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await flowing.wait()
        try:
            near_reader, near_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        self._near[port].add(near_writer)
        self._writers.append(near_writer)
        try:
            await asyncio.gather(_pump(flowing, reader, near_writer), _pump(flowing, near_reader, writer))
        finally:
            self._near[port].discard(near_writer)


async def _pump(flowing: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            await flowing.wait()
            writer.write(data)
            await writer.drain()
    await flowing.wait()
    writer.close()
