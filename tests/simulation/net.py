"""A simulated TCP under the product's own frames: the `Net` of `kvstore.exchange`, by asyncio's streams over pipes.

    TcpFrames -> StreamWriter -> _End.write -> _Pipe (late, in pieces, in order) -> StreamReader -> TcpFrames

and under whatever else calls `asyncio.open_connection`, as redis-py does.

Bytes that meet a partition wait for its end, as TCP's would. A killed host resets its connections. One that vanishes
(`silently`) leaves the other ends half open: until it is back and somebody writes to it, or, where the way there has
forgotten the connection, for ever. A cut connection ends for both sides after so many bytes, at any of them.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from kvstore.exchange.framing import FrameStream, TcpFrames
from tests.simulation.loop import Process, SimLoop

_WINDOW_BYTES: Final = 64 * 1024
_RETRY_S: Final = 1.0
_RESET: Final = object()
_Accept = Callable[[FrameStream], Awaitable[None]]
_AcceptBytes = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Weather:
    """How bad the network is; may change at any time."""

    max_latency_s: float = 0.001
    split: float = 0.0
    """How often a piece arrives as two."""
    cut: float = 0.0
    """How often a new connection is cut, after any number of bytes below the next one."""
    max_cut_bytes: int = 3000  # a handshake takes some 1000, a transfer some 300 more


@dataclass
class SimNet:
    """The network between hosts. `faults` counts what it did of itself."""

    loop: SimLoop
    weather: Weather = field(default_factory=Weather)
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._listeners: dict[tuple[str, int], _Listener] = {}
        self._connections: list[_Connection] = []
        self._apart: set[frozenset[str]] = set()
        self._gone: set[str] = set()
        self.next_port = itertools.count(40_000).__next__
        self.loop.open_connection = self._open_connection

    def of(self, host: str, process: Process) -> HostNet:
        """The `Net` of one process."""
        self._gone.discard(host)
        return HostNet(self, host, process)

    def part(self, one: str, other: str) -> None:
        self._apart.add(frozenset((one, other)))

    def join(self, one: str, other: str) -> None:
        """End a partition; what waited arrives."""
        self._apart.discard(frozenset((one, other)))
        self._pump_all()

    def kill(self, host: str, silently: bool) -> None:
        """The host's process is gone: nobody listens, and its connections are reset, unless it went `silently`."""
        self._listeners = {at: each for at, each in self._listeners.items() if at[0] != host}
        if silently:
            self._gone.add(host)
        for connection in self._of_host(host):
            connection.kill(host, silently)
            connection.is_forgotten = silently and self.loop.random.random() < 0.5

    def back(self, host: str) -> None:
        """The host is there again: whoever has a half-open connection to it learns so when it writes."""
        self._gone.discard(host)
        self._pump_all()

    def finish(self) -> None:
        """The run is over, perhaps in mid-sentence: who lets go of a connection then has not forgotten to close it."""
        for connection in self._connections:
            connection.client.vanish()
            connection.server.vanish()

    def is_blocked(self, one: str, other: str) -> bool:
        return frozenset((one, other)) in self._apart or one in self._gone or other in self._gone

    def connect(self, client: HostNet, at: tuple[str, int]) -> _End:
        """Make a connection to who listens there; return its end that has dialled. Raises OSError."""
        listener = self._listeners.get(at)
        if listener is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {at[0]}:{at[1]}")
        draw = self.loop.random
        cut_after = draw.randrange(self.weather.max_cut_bytes) if draw.random() < self.weather.cut else None
        connection = _Connection(self, client, listener, cut_after)
        self._connections = [each for each in self._connections if not each.is_over]
        self._connections.append(connection)
        return connection.client

    async def _open_connection(
        self, make: Callable[[], asyncio.StreamReaderProtocol], host: str, port: int
    ) -> tuple[_End, asyncio.StreamReaderProtocol]:
        """What `asyncio.open_connection` asks the loop for. A process's host is called as it is, up to the slash."""
        process = self.loop.process
        end, protocol = await HostNet(self, process.name.partition("/")[0], process).reach(host, port), make()
        end.plug(protocol)
        return end, protocol

    def _of_host(self, host: str) -> list[_Connection]:
        return [each for each in self._connections if host in each.hosts]

    def _pump_all(self) -> None:
        for connection in self._connections:
            connection.pump()


@dataclass
class HostNet:
    """`Net` of one process."""

    net: SimNet
    host: str
    process: Process

    async def listen(self, host: str, port: int, accept: _Accept) -> _Listener:
        return self.listen_for_bytes(port, lambda reader, writer: accept(TcpFrames(reader, writer)))

    def listen_for_bytes(self, port: int, accept: _AcceptBytes) -> _Listener:
        port = port or self.net.next_port()
        if (self.host, port) in self.net._listeners:
            raise OSError(errno.EADDRINUSE, f"{self.host}:{port} is taken")
        listener = self.net._listeners[self.host, port] = _Listener(self.net, self, port, accept)
        return listener

    async def dial(self, host: str, port: int) -> FrameStream:
        return (await self.reach(host, port)).dialled()

    async def reach(self, host: str, port: int) -> _End:
        """Our end of a new connection, to be plugged in at once. Raises OSError."""
        await asyncio.sleep(self.net.loop.random.uniform(0, self.net.weather.max_latency_s))
        while self.net.is_blocked(self.host, host):  # noqa: ASYNC110 -- as TCP does
            await asyncio.sleep(_RETRY_S)
        return self.net.connect(self, (host, port))


@dataclass
class _Listener:
    net: SimNet
    at: HostNet
    port: int
    accept: _AcceptBytes

    @property
    def address(self) -> str:
        return f"{self.at.host}:{self.port}"

    def close(self) -> None:
        if self.net._listeners.get((self.at.host, self.port)) is self:
            del self.net._listeners[self.at.host, self.port]


class _Connection:
    """Two ends and two pipes."""

    def __init__(self, net: SimNet, client: HostNet, listener: _Listener, cut_after: int | None) -> None:
        self.net = net
        self.hosts = (client.host, listener.at.host)
        self._cut_after = cut_after
        self._num_carried = 0
        self.is_forgotten = False
        server_at = (listener.at.host, listener.port)
        self.client = _End(net.loop, client.process, client.host, server_at)
        self.server = _End(net.loop, listener.at.process, listener.at.host, (client.host, net.next_port()))
        self.client.out = _Pipe(self, self.client, self.server)
        self.server.out = _Pipe(self, self.server, self.client)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await listener.accept(reader, writer)

        self.client.into, self.server.into = self.server.out, self.client.out
        with net.loop.within(listener.at.process):
            self.server.serve(accept)

    @property
    def is_over(self) -> bool:
        return self.client.is_lost and self.server.is_lost

    def may_carry(self, num_bytes: int) -> int:
        """Note that so many bytes arrive; return how many do before the connection is cut."""
        before, self._num_carried = self._num_carried, self._num_carried + num_bytes
        if self._cut_after is None or self._num_carried <= self._cut_after:
            return num_bytes
        return max(0, self._cut_after - before)

    def cut(self) -> None:
        self.net.faults["cut"] += 1
        for end in (self.client, self.server):
            end.reset_later()

    def kill(self, host: str, silently: bool) -> None:
        for end in (self.client, self.server):
            end.out.clear()
            if end.host == host:
                end.vanish()
            elif not silently:
                end.reset_later()

    def pump(self) -> None:
        self.client.out.pump()
        self.server.out.pump()


class _Pipe:
    """The way from one end to the other."""

    def __init__(self, connection: _Connection, source: _End, target: _End) -> None:
        self.num_bytes = 0
        self._connection = connection
        self._source = source
        self._target = target
        self._queue: deque[tuple[float, Any]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._last_arrival = 0.0

    def put(self, piece: Any) -> None:
        """Bytes, None for the end of the stream, or _RESET."""
        net = self._connection.net
        draw = net.loop.random
        pieces = [piece]
        if isinstance(piece, bytes) and len(piece) > 1 and draw.random() < net.weather.split:
            at = draw.randrange(1, len(piece))
            pieces = [piece[:at], piece[at:]]
        for each in pieces:
            arrival = max(self._last_arrival, net.loop.time() + draw.uniform(0, net.weather.max_latency_s))
            self._last_arrival = arrival
            self._queue.append((arrival, each))
            self.num_bytes += len(each) if isinstance(each, bytes) else 0
        self.pump()

    def clear(self) -> None:
        self._queue.clear()
        self.num_bytes = 0

    def pump(self) -> None:
        """Have the first piece arrive at its time, unless that is arranged already, or nothing gets through."""
        if self._timer is None and self._queue and not self._is_blocked():
            loop = self._connection.net.loop
            # A dead process's kernel answers for it: then it is the source that hears of the arrival.
            with loop.within(self._source.process if self._target.is_lost else self._target.process):
                self._timer = loop.call_at(max(loop.time(), self._queue[0][0]), self._arrive)

    def _is_blocked(self) -> bool:
        if self._target.is_full or self._connection.is_forgotten:
            return True
        return self._connection.net.is_blocked(self._source.host, self._target.host)

    def _arrive(self) -> None:
        self._timer = None
        if not self._queue or self._is_blocked():
            return
        _, piece = self._queue.popleft()
        if piece is _RESET:
            self._target.lose(ConnectionResetError(errno.ECONNRESET, "reset by the peer"))
        elif self._target.is_lost:
            if piece:
                self._source.reset_later()
        elif piece is None:
            self._target.protocol.eof_received()
        else:
            self.num_bytes -= len(piece)
            num_arriving = self._connection.may_carry(len(piece))
            if num_arriving:
                self._target.protocol.data_received(piece[:num_arriving])
            if num_arriving < len(piece):
                self._connection.cut()
                return
            self._source.drained()
        self.pump()


class _End(asyncio.Transport):
    """One process's end of a connection: what asyncio calls a transport."""

    out: _Pipe
    into: _Pipe
    protocol: asyncio.StreamReaderProtocol

    def __init__(self, loop: SimLoop, process: Process, host: str, peer: tuple[str, int]) -> None:
        super().__init__(extra={"peername": peer})
        self.process = process
        self.host = host
        self.is_lost = False
        self.is_full = False
        self._loop = loop
        self._is_closing = False
        self._is_paused = False

    def serve(self, accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        """Be the end that was dialled; asyncio makes a task of `accept`."""
        self._open(accept)

    def dialled(self) -> TcpFrames:
        """Be the end that has dialled."""
        reader = self._open(None)
        return TcpFrames(reader, asyncio.StreamWriter(self, self.protocol, reader, self._loop))

    def plug(self, protocol: asyncio.StreamReaderProtocol) -> None:
        """Tell this one from now on what comes."""
        self.protocol = protocol
        protocol.connection_made(self)

    def _open(self, accept: Callable[..., Awaitable[None]] | None) -> asyncio.StreamReader:
        reader = asyncio.StreamReader(limit=_WINDOW_BYTES, loop=self._loop)
        self.plug(asyncio.StreamReaderProtocol(reader, accept, loop=self._loop))
        return reader

    # ---- what the network does ----

    def lose(self, error: Exception | None) -> None:
        if not self.is_lost:
            self.is_lost = self._is_closing = True
            if error is not None:
                self.out.clear()
            self.protocol.connection_lost(error)

    def vanish(self) -> None:
        """The process is dead, and sees nothing of it."""
        self.is_lost = self._is_closing = True

    def reset_later(self) -> None:
        self.out.clear()
        with self._loop.within(self.process):
            self._loop.call_soon(self.lose, ConnectionResetError(errno.ECONNRESET, "reset by the peer"))

    def drained(self) -> None:
        """Some of what we wrote has arrived."""
        if self.out.num_bytes > _WINDOW_BYTES or self.is_lost:
            return
        with self._loop.within(self.process):
            if self._is_paused:
                self._is_paused = False
                self._loop.call_soon(self.protocol.resume_writing)
            if self._is_closing:
                self._loop.call_soon(self.lose, None)

    # ---- what the product calls, through asyncio's streams ----

    def write(self, data: Any) -> None:
        if self._is_closing:
            return
        self.out.put(bytes(data))
        if self.out.num_bytes > _WINDOW_BYTES and not self._is_paused:
            self._is_paused = True
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return max(0, self.out.num_bytes - _WINDOW_BYTES)

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self.out.put(None)
            self.drained()

    def abort(self) -> None:
        if not self.is_lost:
            self._is_closing = True
            self.out.clear()
            self.out.put(_RESET)
            self._loop.call_soon(self.lose, None)

    def is_reading(self) -> bool:
        return not self.is_full

    def pause_reading(self) -> None:
        self.is_full = True

    def resume_reading(self) -> None:
        self.is_full = False
        self.into.pump()
