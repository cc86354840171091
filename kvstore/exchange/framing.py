"""Messages over a TCP stream: one frame at a time in, bounded buffers out."""

from __future__ import annotations

import asyncio
from typing import Final

from kvstore.errors import PeerLost
from kvstore.protocol import (
    LENGTH_BYTES,
    Message,
    decode,
    decode_length,
    encode,
)

MAX_UNSENT_BYTES: Final = 16 * 1024 * 1024
STREAM_BUFFER_BYTES: Final = 64 * 1024


class FrameStream:
    """One TCP connection as a stream of messages. Never holds more than a frame of input and a bounded output."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        peername = writer.get_extra_info("peername")
        self.peer_host = str(peername[0]) if peername else "unknown"
        self.peer_address = f"{peername[0]}:{peername[1]}" if peername else "unknown"

    async def receive(self) -> Message:
        """Return the next message. Raises `PeerLost` at the end of the stream, `ProtocolViolation` on garbage."""
        try:
            num_bytes = decode_length(await self._reader.readexactly(LENGTH_BYTES))
            body = await self._reader.readexactly(num_bytes)
        except asyncio.IncompleteReadError as error:
            where = f" in the middle of a frame ({len(error.partial)} bytes)" if error.partial else ""
            raise PeerLost(f"the peer closed the connection{where}") from error
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error
        return decode(body)

    def send(self, message: Message) -> None:
        """Queue a message; nothing happens on a closed stream. Raises `PeerLost` where the peer takes no more data."""
        if self._writer.is_closing():
            return
        self._writer.write(encode(message))
        num_unsent = self._writer.transport.get_write_buffer_size()
        if num_unsent > MAX_UNSENT_BYTES:
            raise PeerLost(f"the peer takes no data: {num_unsent} bytes wait to be sent")

    async def close(self, flush_s: float = 0.0) -> None:
        """Close the connection; give queued messages up to `flush_s` to leave."""
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
