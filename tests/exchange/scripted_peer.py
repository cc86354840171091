"""A peer of the exchange that does what a test writes down, over a plain socket."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvstore.exchange.framing import TcpFrames
from kvstore.peer_keys import PeerKeys, Transcript
from kvstore.protocol import (
    LENGTH_BYTES,
    PROTOCOL_VERSION,
    Choose,
    Hello,
    Prove,
    Ready,
    TransportOffer,
    Welcome,
    encode,
)
from kvstore.protocol.messages import Heartbeat
from tests.exchange.exchange_worker import LAYOUT, PEER_KEY, Worker

BOUND_S = 10.0


def hello(
    version: int = PROTOCOL_VERSION,
    peer_id: str = "script-0",
    incarnation: str = "script-1",
    features: tuple[str, ...] = (),
) -> Hello:
    offers = [TransportOffer("memory", b"")]
    key_ids = PeerKeys((PEER_KEY,)).ids
    return Hello(
        version, peer_id, "decode", incarnation, LAYOUT.to_wire(), offers, list(features), os.urandom(16), key_ids
    )


class Script:
    """A peer that does what the test writes down."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.stream = TcpFrames(reader, writer)

    async def expect(self, kind: type):
        """Return the next message that is no heartbeat."""
        async with asyncio.timeout(BOUND_S):
            while isinstance(message := await self.stream.receive(), Heartbeat) and kind is not Heartbeat:
                pass
        assert isinstance(message, kind), message
        return message

    async def read_until_closed(self) -> None:
        async with asyncio.timeout(BOUND_S):
            try:
                while await self.stream._reader.read(1 << 16):
                    pass
            except OSError:
                pass

    async def introduce_as_reader(self, body: bytes | None = None) -> None:
        """`body`: of another hello than ours."""
        body = encode(hello())[LENGTH_BYTES:] if body is None else body
        self.writer.write(len(body).to_bytes(LENGTH_BYTES, "big") + body)
        transcript = Transcript(PEER_KEY, body, await self.stream.receive_body())
        self.stream.send(Prove(transcript.proof("dialler")))
        await self.expect(Welcome)
        self.stream.seal(transcript.seal("dialler"), transcript.seal("listener"))
        self.stream.send(Choose("memory", bytes(16)))
        self.stream.send(Ready())
        await self.expect(Ready)

    async def introduce_as_owner(self, pool: Worker, features: tuple[str, ...] = ()) -> Choose:
        """Return what the reader chose."""
        ours = hello(features=features)
        transcript = Transcript(PEER_KEY, await self.stream.receive_body(), encode(ours)[LENGTH_BYTES:])
        self.stream.send(ours)
        await self.expect(Prove)
        offer = TransportOffer("memory", pool.transport.descriptor())
        self.stream.send(Welcome(transcript.proof("listener", offer.name.encode(), offer.descriptor), [offer]))
        self.stream.seal(transcript.seal("listener"), transcript.seal("dialler"))
        choice = await self.expect(Choose)
        await self.expect(Ready)
        self.stream.send(Ready())
        return choice


@asynccontextmanager
async def dialled(worker: Worker) -> AsyncIterator[Script]:
    host, _, port = worker.exchange.address.rpartition(":")
    script = Script(*await asyncio.open_connection(host, int(port)))
    try:
        yield script
    finally:
        script.writer.transport.abort()


@asynccontextmanager
async def scripted_owner(play) -> AsyncIterator[str]:
    """An owner that plays `play(script)`, then falls silent with its connection open, as a stopped process does."""
    scripts: list[Script] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        scripts.append(Script(reader, writer))
        await play(scripts[-1])

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for script in scripts:
            script.writer.transport.abort()
