"""The server: asyncio's streams in, RESP out, over a `Keyspace` and its `Scripts`.

    redis.asyncio, as installed ── streams, simulated or real ──▶ serve ─▶ Keyspace.run, Scripts.run ─▶ reply
                                                                   ▲                │ PUBLISH
                                                                   └── subscribers ◀┘

The clients are the product's, on redis-py's own connections: so what a cut, a late answer or a half-open connection
does to them is what it does in production. fakeredis has no `bit` for its scripts, takes the time and its randomness
from the process, and stands in for redis-py's connections; of it only the commands would have been left to use.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

from tests.simulation.redis_model.keyspace import OK, CommandError, Keyspace, Reply, Status
from tests.simulation.redis_model.scripts import Scripts


async def _at_once() -> None: ...


class ModelRedis:
    """One server process. `clock`: Unix time. `pause`: awaited before each command, one after the other."""

    def __init__(
        self,
        clock: Callable[[], float],
        seed: int,
        password: str = "",
        pause: Callable[[], Awaitable[None]] = _at_once,
        content: Keyspace | None = None,
    ) -> None:
        self.keyspace = content or Keyspace(clock, random.Random(seed))
        self.keyspace.publish = self._publish
        self._password = password.encode()
        self._pause = pause
        self._scripts = Scripts(self.keyspace)
        self._subscribers: dict[bytes, dict[asyncio.StreamWriter, None]] = {}
        self._turn = asyncio.Lock()  # a server runs one command at a time
        self._writers: dict[asyncio.StreamWriter, None] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client until it goes."""
        self._writers[writer] = None
        is_known = not self._password
        try:
            while True:
                name, *arguments = await _read_command(reader)
                async with self._turn:
                    await self._pause()
                    name = name.upper()
                    if name == b"AUTH":
                        is_known = arguments[-1:] == [self._password]
                        text = "WRONGPASS invalid username-password pair or user is disabled."
                        writer.write(_encode(OK) if is_known else _encode_error(text))
                    elif not is_known:
                        writer.write(_encode_error("NOAUTH Authentication required."))
                    else:
                        writer.write(self._answer(name, arguments, writer))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass  # it has gone
        finally:
            for channel in self._subscribers.values():
                channel.pop(writer, None)
            self._writers.pop(writer, None)
            writer.close()

    def drop_clients(self) -> None:
        """Reset all connections, as CLIENT KILL does."""
        for writer in list(self._writers):
            writer.transport.abort()

    def _answer(self, name: bytes, arguments: list[bytes], writer: asyncio.StreamWriter) -> bytes:
        try:
            match name:
                case b"SUBSCRIBE" | b"UNSUBSCRIBE":
                    return self._subscribe(name, arguments, writer)
                case b"PING":
                    return _encode(Status(b"PONG"))
                case b"EVAL" | b"EVALSHA":
                    return _encode(self._evaluate(name, arguments))
                case b"SCRIPT" if arguments[0].upper() == b"LOAD":
                    return _encode(self._scripts.load(arguments[1]))
            return _encode(self.keyspace.run(name, arguments))
        except CommandError as error:
            return _encode_error(str(error))

    def _evaluate(self, name: bytes, arguments: list[bytes]) -> Reply:
        script, num_keys, *rest = arguments
        digest = self._scripts.load(script) if name == b"EVAL" else script
        return self._scripts.run(digest, rest[: int(num_keys)], rest[int(num_keys) :])

    def _subscribe(self, name: bytes, channels: list[bytes], writer: asyncio.StreamWriter) -> bytes:
        said = b""
        mine = [channel for channel, writers in self._subscribers.items() if writer in writers]
        for channel in channels or mine:
            subscribers = self._subscribers.setdefault(channel, {})
            if name == b"SUBSCRIBE":
                subscribers[writer] = None
            else:
                subscribers.pop(writer, None)
            count = sum(writer in writers for writers in self._subscribers.values())
            said += _encode([name.lower(), channel, count])
        return said or _encode([name.lower(), None, 0])

    def _publish(self, channel: bytes, message: bytes) -> int:
        subscribers = list(self._subscribers.get(channel, ()))
        for writer in subscribers:
            with contextlib.suppress(OSError):
                writer.write(_encode([b"message", channel, message]))
        return len(subscribers)


async def _read_command(reader: asyncio.StreamReader) -> list[bytes]:
    words = []
    for _ in range(await _read_number(reader, b"*")):
        size = await _read_number(reader, b"$")
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


async def _read_number(reader: asyncio.StreamReader, kind: bytes) -> int:
    line = await reader.readuntil(b"\r\n")
    assert line[:1] == kind, f"no command of redis-py's: {line!r}"
    return int(line[1:])


def _encode(reply: Reply) -> bytes:
    match reply:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % reply
        case Status():
            return b"+%s\r\n" % reply
        case bytes():
            return b"$%d\r\n%s\r\n" % (len(reply), reply)
    return b"*%d\r\n" % len(reply) + b"".join(map(_encode, reply))


def _encode_error(text: str) -> bytes:
    return b"-%s\r\n" % text.replace("\r", " ").replace("\n", " ").encode()
