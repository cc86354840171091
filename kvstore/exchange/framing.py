"""Gives the block protocol its outside: connections with frames, a clock, names, threads.

`main()` makes one `Outside` and hands it down; a simulation hands down its own.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvstore.errors import PeerLost, ProtocolViolation
from kvstore.peer_keys import SEAL_BYTES, Seal
from kvstore.protocol import LENGTH_BYTES, MAX_FRAME_BYTES, Message, decode, decode_length, encode
from kvstore.threads import OsThreads, Threads

MAX_UNSENT_BYTES: Final = 16 * 1024 * 1024
_STREAM_BUFFER_BYTES: Final = 64 * 1024


class FrameStream(Protocol):
    """One connection as a stream of messages. Never holds more than a frame of input and a bounded output."""

    @property
    def peer_host(self) -> str:
        """Under which address the peer's process is reached."""

    @property
    def peer_address(self) -> str:
        """The peer's end, `host:port`."""

    async def receive(self) -> Message:
        """Return the next message. Raises `PeerLost` at the end of the stream, `ProtocolViolation` on garbage."""

    async def receive_body(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """Return the next message as it came; errors as `receive`."""

    def seal(self, sending: Seal, receiving: Seal) -> None:
        """Seal what is sent from now on, and take nothing without a seal."""

    def send(self, message: Message) -> None:
        """Queue a message; nothing happens on a closed stream. Raises `PeerLost` where the peer takes no more data."""

    async def close(self, flush_s: float = 0.0) -> None:
        """Close the connection; give queued messages up to `flush_s` to leave."""


class Listener(Protocol):
    """A port that is listened on."""

    @property
    def address(self) -> str:
        """`host:port`."""

    def close(self) -> None:
        """Accept nobody any more."""


class Net(Protocol):
    """Opens connections."""

    async def listen(self, host: str, port: int, accept: Callable[[FrameStream], Awaitable[None]]) -> Listener:
        """Call `accept`, as a task, with each connection that comes; port 0 takes a free one. Raises OSError."""

    async def dial(self, host: str, port: int) -> FrameStream:
        """Connect. Raises OSError; the caller bounds it in time by cancelling it."""


class TcpNet:
    """Connections over TCP."""

    async def listen(self, host: str, port: int, accept: Callable[[FrameStream], Awaitable[None]]) -> TcpListener:
        """Listen with asyncio's server, which owns the tasks."""

        async def accept_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await accept(TcpFrames(reader, writer))

        return TcpListener(await asyncio.start_server(accept_one, host, port, limit=_STREAM_BUFFER_BYTES))

    async def dial(self, host: str, port: int) -> TcpFrames:
        """Connect."""
        return TcpFrames(*await asyncio.open_connection(host, port, limit=_STREAM_BUFFER_BYTES))


class TcpListener:
    """asyncio's server, and where it listens."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        host, port = server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    def close(self) -> None:
        """Close the port."""
        self._server.close()


class TcpFrames:
    """A TCP connection."""

    _sending: Seal | None = None
    _receiving: Seal | None = None

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        peername = writer.get_extra_info("peername")
        self.peer_host = str(peername[0]) if peername else "unknown"
        self.peer_address = f"{peername[0]}:{peername[1]}" if peername else "unknown"

    async def receive(self) -> Message:
        """Read a frame."""
        return decode(await self.receive_body())

    async def receive_body(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """Read a length, then a body of it."""
        max_bytes += SEAL_BYTES if self._receiving is not None else 0
        try:
            num_bytes = decode_length(await self._reader.readexactly(LENGTH_BYTES), max_bytes)
            body = await self._reader.readexactly(num_bytes)
        except asyncio.IncompleteReadError as error:
            where = f" in the middle of a frame ({len(error.partial)} bytes)" if error.partial else ""
            raise PeerLost(f"the peer closed the connection{where}") from error
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error
        if self._receiving is None:
            return body
        body, seal = body[:-SEAL_BYTES], body[-SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._receiving.of(body)):
            raise ProtocolViolation(f"a frame of {num_bytes} bytes that the peer has not sealed")
        return body

    def seal(self, sending: Seal, receiving: Seal) -> None:
        """From now on."""
        self._sending, self._receiving = sending, receiving

    def send(self, message: Message) -> None:
        """Write to the socket's buffer."""
        if self._writer.is_closing():
            return
        frame = encode(message)
        if self._sending is not None:
            body = frame[LENGTH_BYTES:] + self._sending.of(frame[LENGTH_BYTES:])
            frame = len(body).to_bytes(LENGTH_BYTES, "big") + body
        self._writer.write(frame)
        num_unsent = self._writer.transport.get_write_buffer_size()
        if num_unsent > MAX_UNSENT_BYTES:
            raise PeerLost(f"the peer takes no data: {num_unsent} bytes wait to be sent")

    async def close(self, flush_s: float = 0.0) -> None:
        """Drain for `flush_s`, then abort."""
        try:
            if flush_s > 0:
                async with asyncio.timeout(flush_s):
                    await self._writer.drain()
                    self._writer.close()
                    await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # it was a courtesy: the connection ends in any case
        finally:
            self._writer.transport.abort()


@dataclass(frozen=True)
class Outside:
    """All that an exchange meets beside its transports. `new_id` names transfers and links: 16 bytes, never twice."""

    net: Net = field(default_factory=TcpNet)
    clock: Callable[[], float] = time.monotonic
    new_id: Callable[[], bytes] = lambda: os.urandom(16)
    threads: Threads = field(default_factory=OsThreads)
