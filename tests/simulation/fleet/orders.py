"""Work orders over the simulated network: the `Orders` and `OrderServer` of `services.orders`.

Each direction of a stream is a queue whose messages arrive late, in order, and not at all through a partition, which
they wait out. A killed process resets its streams; of one that vanishes the other end hears by a keepalive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

from tandem.v1 import worker_pb2 as pb

from services.orders import ServePrefill, ServeSession, StreamBroken, StreamRefused
from tests.simulation.loop import Process, SimLoop
from tests.simulation.net import SimNet

_KEEPALIVE_S: Final = 15.0
_RETRY_S: Final = 0.5
_CONNECT_S: Final = 20.0
_WINDOW: Final = 64
_END: Final = object()

_Message = TypeVar("_Message", bound=Any)


class OrderNet:
    """The order ports of all hosts, and the streams between them."""

    def __init__(self, loop: SimLoop, net: SimNet) -> None:
        self.loop = loop
        self.net = net
        self.servers: dict[str, SimOrderServer] = {}
        self.streams: dict[_Stream, None] = {}

    def kill(self, process: Process, silently: bool) -> None:
        """The process is gone: its ports are closed, and who has a stream with it hears so."""
        self.servers = {at: each for at, each in self.servers.items() if each.process is not process}
        for stream in list(self.streams):
            if process in (stream.client, stream.server):
                delay_s = _KEEPALIVE_S if silently else self.loop.random.uniform(0, 0.1)
                other = stream.server if process is stream.client else stream.client
                with self.loop.within(other):
                    self.loop.call_later(delay_s, stream.break_off, f"{process.name} is gone")


class SimOrderServer:
    """A worker's order port: the `OrderServer` of its service."""

    def __init__(self, orders: OrderNet, address: str, process: Process) -> None:
        self.process = process
        self.address = address
        self.session: ServeSession | None = None
        self.prefill: ServePrefill | None = None
        self._orders = orders

    def serve_sessions(self, serve: ServeSession) -> None:
        self.session = serve

    def serve_prefills(self, serve: ServePrefill) -> None:
        self.prefill = serve

    def start(self) -> None:
        self._orders.servers[self.address] = self

    async def stop(self) -> None:
        """Accept nothing more, and cancel what runs."""
        if self._orders.servers.get(self.address) is self:
            del self._orders.servers[self.address]
        tasks = [stream.serving for stream in self._orders.streams if stream.server is self.process]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)


class SimOrders:
    """`Orders` of one process."""

    def __init__(self, orders: OrderNet, host: str, process: Process) -> None:
        self._orders = orders
        self._host = host
        self._process = process

    async def session(
        self, address: str, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionFrame, None]:
        server = await self._reach(address)
        serve = server.session
        assert serve is not None, f"{address} serves no sessions"
        stream = _Stream(self._orders, self._process, server)
        stream.serve(lambda: serve(stream.requests.receive(), stream.answers.send))
        sending = asyncio.create_task(_send_all(requests, stream.requests), name=f"requests to {address}")
        try:
            async for frame in stream.answers.receive():
                yield frame
        finally:
            sending.cancel()
            stream.leave()
            await asyncio.wait([sending])

    async def prefill(self, address: str, order: pb.PrefillRequest) -> AsyncGenerator[pb.PrefillEvent, None]:
        server = await self._reach(address)
        serve, sent = server.prefill, _copied(order)
        assert serve is not None, f"{address} serves no prefills"
        stream = _Stream(self._orders, self._process, server)
        stream.serve(lambda: serve(sent, stream.answers.send))
        try:
            async for event in stream.answers.receive():
                yield event
        finally:
            stream.leave()

    async def forget(self, address: str) -> None: ...

    async def close(self) -> None:
        for stream in list(self._orders.streams):
            if stream.client is self._process:
                stream.break_off("closed")

    async def _reach(self, address: str) -> SimOrderServer:
        loop, host = self._orders.loop, address.partition(":")[0]
        await asyncio.sleep(loop.random.uniform(0, self._orders.net.weather.max_latency_s))
        give_up_at = loop.time() + _CONNECT_S
        while self._orders.net.is_blocked(self._host, host):
            if loop.time() >= give_up_at:
                raise StreamBroken(f"{address} cannot be reached")
            await asyncio.sleep(_RETRY_S)
        if address not in self._orders.servers:
            raise StreamBroken(f"nobody listens on {address}")
        return self._orders.servers[address]


class _Stream:
    """One call: requests one way, answers the other."""

    def __init__(self, orders: OrderNet, client: Process, server: SimOrderServer) -> None:
        self.client, self.server = client, server.process
        hosts = client.name.partition("/")[0], server.process.name.partition("/")[0]
        self.requests: _Way[Any] = _Way(orders, hosts, client, server.process)
        self.answers: _Way[Any] = _Way(orders, hosts, server.process, client)
        self.serving: asyncio.Task[None] | None = None
        self._orders = orders
        orders.streams[self] = None

    def serve(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have the server serve it, once it has heard of it."""

        async def run() -> None:
            end: object = _END
            try:
                await work()
            except StreamRefused as error:
                end = StreamBroken(str(error))
            except asyncio.CancelledError:
                end = StreamBroken("the server is gone")
                raise
            except Exception as error:
                end = StreamBroken(f"the server failed: {error!r}")
                raise
            finally:
                self.answers.end(end)
                self._orders.streams.pop(self, None)

        def start(coroutine: Coroutine[Any, Any, None]) -> None:
            self.serving = self._orders.loop.create_task(coroutine, name="serving")
            self.serving.add_done_callback(lambda done: done.cancelled() or done.exception())

        with self._orders.loop.within(self.server):
            start(run())

    def leave(self) -> None:
        """The client wants no more: the server is cancelled when it hears so."""
        self.requests.end(_END)
        with self._orders.loop.within(self.server):
            self._orders.loop.call_later(self._orders.loop.random.uniform(0, 0.05), self._cancel)

    def break_off(self, why: str) -> None:
        """The stream is no more, for whoever is left of the two."""
        self._orders.streams.pop(self, None)
        if not self.client.is_killed:
            self.answers.break_off(StreamBroken(why))
        if not self.server.is_killed:
            self._cancel()

    def _cancel(self) -> None:
        if self._orders.net.is_blocked(*self.answers.hosts) and not self.client.is_killed:
            self._orders.loop.call_later(_RETRY_S, self._cancel)
        elif self.serving is not None:
            self.serving.cancel()


class _Way(Generic[_Message]):
    """One direction. A sender that is `_WINDOW` messages ahead waits."""

    def __init__(self, orders: OrderNet, hosts: tuple[str, str], source: Process, target: Process) -> None:
        self.hosts = hosts
        self._orders = orders
        self._source = source
        self._target = target
        self._on_way: deque[object] = deque()
        self._arrived: deque[object] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._has_room: asyncio.Future[None] | None = None
        self._last_s = 0.0

    async def send(self, message: _Message) -> None:
        while len(self._on_way) + len(self._arrived) >= _WINDOW:
            self._has_room = self._orders.loop.create_future()
            await self._has_room
        self._put(_copied(message))

    def end(self, how: object) -> None:
        """`_END` or an error."""
        self._put(how)

    def break_off(self, error: StreamBroken) -> None:
        """Nothing more arrives but the error."""
        self._on_way.clear()
        self._arrived.append(error)
        self._wake()

    async def receive(self) -> AsyncIterator[_Message]:
        while True:
            while not self._arrived:
                self._waiting = self._orders.loop.create_future()
                await self._waiting
            message = self._arrived.popleft()
            if self._has_room is not None and not self._has_room.done():
                with self._orders.loop.within(self._source):
                    self._orders.loop.call_soon(_settle, self._has_room)
            if message is _END:
                return
            if isinstance(message, Exception):
                raise message
            yield message  # type: ignore[misc]

    def _put(self, message: object) -> None:
        loop = self._orders.loop
        self._on_way.append(message)
        self._last_s = max(self._last_s, loop.time() + loop.random.uniform(0, self._orders.net.weather.max_latency_s))
        with loop.within(self._target):
            loop.call_at(self._last_s, self._arrive)

    def _arrive(self) -> None:
        if self._orders.net.is_blocked(*self.hosts):
            self._orders.loop.call_later(_RETRY_S, self._arrive)
        elif self._on_way:
            self._arrived.append(self._on_way.popleft())
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None:
            with self._orders.loop.within(self._target):
                self._orders.loop.call_soon(_settle, self._waiting)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _copied(message: _Message) -> _Message:
    copy: _Message = type(message).FromString(message.SerializeToString())
    return copy


async def _send_all(requests: AsyncIterator[_Message], way: _Way[_Message]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        async for request in requests:
            await way.send(request)
