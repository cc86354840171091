"""Work orders within one process: `services.orders` without a network, for the router's and the workers' tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

from tandem.v1 import worker_pb2 as pb

from services.orders import (
    ServePrefill,
    ServeSession,
    StreamBroken,
    StreamRefused,
)

Message = TypeVar("Message")


class MemoryServer:
    """A worker's end: what it serves, until it is stopped."""

    def __init__(self) -> None:
        self.session: ServeSession | None = None
        self.prefill: ServePrefill | None = None
        self.running: set[asyncio.Future[None]] = set()

    def serve_sessions(self, serve: ServeSession) -> None:
        self.session = serve

    def serve_prefills(self, serve: ServePrefill) -> None:
        self.prefill = serve

    async def stop(self) -> None:
        """Break off what runs."""
        for task in list(self.running):
            task.cancel()
            await asyncio.wait([task])


class MemoryOrders:
    """Gives orders to the servers that the test puts at addresses."""

    def __init__(self, **servers: MemoryServer) -> None:
        self.servers = servers

    async def session(
        self, address: str, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionFrame, None]:
        server = self._server(address)
        assert server.session is not None, f"{address} serves no sessions"
        frames: asyncio.Queue[pb.SessionFrame] = asyncio.Queue(1)
        async for frame in _stream(server, frames, server.session(requests, frames.put)):
            yield frame

    async def prefill(self, address: str, order: pb.PrefillRequest) -> AsyncGenerator[pb.PrefillEvent, None]:
        server = self._server(address)
        assert server.prefill is not None, f"{address} serves no prefills"
        events: asyncio.Queue[pb.PrefillEvent] = asyncio.Queue(1)
        async for event in _stream(server, events, server.prefill(order, events.put)):
            yield event

    async def forget(self, address: str) -> None: ...

    async def close(self) -> None:
        for server in self.servers.values():
            await server.stop()

    def _server(self, address: str) -> MemoryServer:
        if address not in self.servers:
            raise StreamBroken(f"nobody is at {address}")
        return self.servers[address]


async def _stream(
    server: MemoryServer, messages: asyncio.Queue[Message], serve: Awaitable[None]
) -> AsyncGenerator[Message, None]:
    """What the server sends, one message at a time, until it returns."""
    serving = asyncio.ensure_future(serve)
    server.running.add(serving)
    serving.add_done_callback(server.running.discard)
    try:
        while True:
            getting = asyncio.ensure_future(messages.get())
            try:
                await asyncio.wait([getting, serving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                getting.cancel()
            if getting.done() and not getting.cancelled():
                yield getting.result()
            elif serving.done():
                break
        if serving.cancelled():
            raise StreamBroken("the server is gone")
        error = serving.exception()
        if isinstance(error, StreamRefused):
            raise StreamBroken(str(error)) from error
        if error is not None:
            raise StreamBroken("the server failed") from error
    finally:
        serving.cancel()
        await asyncio.wait([serving])
