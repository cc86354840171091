"""Carries messages over a Unix socket that nobody but a parent and its process has: a length, then msgpack."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Final, Generic, TypeVar

import msgspec

log = logging.getLogger(__name__)

M = TypeVar("M", bound=msgspec.Struct)

_LENGTH: Final = struct.Struct("!I")
_MAX_BYTES: Final = 64 << 20
"""Of one message; the largest are metrics, below one."""
_MAX_UNSENT_BYTES: Final = 1 << 20


def receive_first(sock: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> M | None:
    """Wait for a message, before there is an event loop; None: the other end has gone."""
    (length,) = _LENGTH.unpack(head) if (head := _read(sock, _LENGTH.size)) else (0,)
    content = _read(sock, length)
    return decoder.decode(content) if content else None


def _read(sock: socket.socket, num_bytes: int) -> bytes:
    content = b""
    while len(content) < num_bytes:
        if not (part := sock.recv(num_bytes - len(content))):
            return b""
        content += part
    return content


class Channel(Generic[M]):
    """One end, in an event loop. `M`: what comes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: msgspec.msgpack.Decoder[M]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def open(cls, sock: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> Channel[M]:
        """Takes the socket over."""
        return cls(*await asyncio.open_unix_connection(sock=sock), decoder)

    def send(self, message: msgspec.Struct) -> bool:
        """Send it, unless it is too large or the other end does not read: False."""
        content = self._encoder.encode(message)
        if len(content) > _MAX_BYTES or self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            return False
        self._writer.write(_LENGTH.pack(len(content)) + content)
        return True

    async def receive(self) -> M | None:
        """The next message; None: the other end has gone. One that cannot be understood, a bug of ours, is passed over:
        who waits for an answer does without it.
        """
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                content = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            try:
                return self._decoder.decode(content)
            except msgspec.MsgspecError:
                log.exception("a message of %d bytes between processes of this router is none", length)

    def close(self) -> None:
        self._writer.close()
