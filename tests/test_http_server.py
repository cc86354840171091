"""What one HTTP connection may hold, of any process: silence, heads, unwanted bodies, answers that nobody reads."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import uvicorn

from services.http_server import HttpLimits, HttpServer, bound_unsent, bounded
from tests.waiting import until

QUICK = HttpLimits(head_timeout_s=0.3, write_timeout_s=0.3, max_head_bytes=4096, max_headers=20)
PATIENT = HttpLimits(max_head_bytes=4096, max_headers=20)


@dataclass
class Served:
    port: int
    cuts: list[str] = field(default_factory=list)
    disconnects: list[str] = field(default_factory=list)

    async def connect(self, num_bytes: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """`num_bytes`: the client's receive buffer, where it shall be small."""
        sock = socket.socket()
        if num_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, num_bytes)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return await asyncio.open_connection(sock=sock)

    async def ask(self, request: bytes) -> bytes:
        """All that comes until the server ends the connection."""
        reader, writer = await self.connect()
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer


@asynccontextmanager
async def serving(limits: HttpLimits):
    """`/stream` writes until its client is gone, `/whole` answers 8 MB at once, others little. None reads bodies."""
    sock = socket.create_server(("127.0.0.1", 0))
    bound_unsent(sock)
    served = Served(sock.getsockname()[1])

    async def app(scope, receive, send):
        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            served.disconnects.append(scope["path"])
            gone.set()

        gone = asyncio.Event()
        body = b"x" * (8 << 20) if scope["path"] == "/whole" else b"{}"
        head = [] if scope["path"] == "/stream" else [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if scope["path"] == "/stream":
            watching = asyncio.create_task(watch())
            while not gone.is_set():
                await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
                await asyncio.sleep(0)
            await watching
        else:
            await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(app, http=bounded(limits, served.cuts.append), log_config=None, lifespan="off")
    server = HttpServer(config)
    task = asyncio.create_task(server.serve([sock]))
    await until(lambda: server.started)
    try:
        yield served
    finally:
        server.should_exit = True
        await task


def error_of(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert error.pop("message")
    assert error == {"type": "invalid_request_error", "param": None, "code": None}
    return head.split()[1].decode()


@pytest.mark.parametrize("sent", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_a_connection_that_sends_no_whole_head_is_closed(sent):
    async with serving(QUICK) as served:
        assert await served.ask(sent) == b""
        assert served.cuts == ["silent"]


async def test_a_head_that_trickles_in_is_closed_at_its_deadline():
    async with serving(QUICK) as served:
        reader, writer = await served.connect()
        writer.write(b"GET / HTTP/1.1\r\n")
        while not reader.at_eof():
            writer.write(b"X-A: b\r\n")
            with_data = await reader.read(100) if served.cuts else b""
            assert with_data == b""
            await asyncio.sleep(0.03)  # slowly enough to stay below the number of headers
        writer.close()
        assert served.cuts == ["silent"]


async def test_the_second_request_of_a_connection_has_a_deadline_too():
    async with serving(QUICK) as served:
        reader, writer = await served.connect()
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"{}")
        writer.write(b"GET / ")
        assert await reader.read() == b""
        writer.close()
        assert served.cuts == ["silent"]


async def test_a_connection_between_two_requests_may_be_idle_for_longer():
    async with serving(QUICK) as served:
        reader, writer = await served.connect()
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"{}")
            await asyncio.sleep(2 * QUICK.head_timeout_s)
        writer.close()
        assert served.cuts == []


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-A: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-A: " + b"x" * (1 << 20) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 300 + b"\r\n",
    ],
    ids=["url", "header", "megabyte", "headers"],
)
async def test_a_head_too_large_gets_a_431_and_is_not_kept(request_head):
    async with serving(PATIENT) as served:
        assert error_of(await served.ask(request_head)) == "431"
        assert served.cuts == ["refused"]


async def test_a_long_body_in_one_piece_with_its_head_is_no_head():
    async with serving(PATIENT) as served:
        request = b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
        assert b"200 OK" in await served.ask(request)
        assert served.cuts == []


async def test_what_is_no_http_gets_a_400_in_our_shape():
    async with serving(PATIENT) as served:
        assert error_of(await served.ask(b"\x16\x03\x01 garbage\r\n\r\n")) == "400"


async def test_the_rest_of_a_body_that_nobody_reads_has_a_deadline():
    async with serving(QUICK) as served:
        answer = await served.ask(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\nx")
        assert answer.endswith(b"{}")
        assert served.cuts == ["silent"]


@pytest.mark.parametrize("path", ["/stream", "/whole"])
async def test_an_answer_that_nobody_reads_is_cut_and_its_request_hears_of_it(path):
    async with serving(QUICK) as served:
        _, writer = await served.connect(num_bytes=4096)
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        await until(lambda: served.cuts == ["unread"])
        await until(lambda: served.disconnects == (["/stream"] if path == "/stream" else []))
        writer.transport.abort()


async def test_who_reads_slowly_is_not_cut():
    async with serving(HttpLimits(write_timeout_s=3.0)) as served:
        reader, writer = await served.connect()
        writer.write(b"GET /stream HTTP/1.1\r\n\r\n")
        num_read = 0
        while num_read < 4_000_000:  # for longer than that takes to cut who reads nothing
            num_read += len(await reader.readexactly(100_000))
            await asyncio.sleep(0.1)
        assert served.cuts == []
        writer.transport.abort()
        await until(lambda: served.disconnects == ["/stream"])


async def test_garbage_behind_a_request_costs_its_sender_nothing_but_the_connection():
    async with serving(PATIENT) as served:
        answer = await served.ask(b"GET / HTTP/1.1\r\n\r\n}}} garbage\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"{}")


async def test_a_body_in_broken_chunks_ends_the_connection():
    async with serving(PATIENT) as served:
        reader, writer = await served.connect()
        writer.write(b"POST /stream HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"no number\r\n")
        await until(lambda: served.disconnects == ["/stream"])
        writer.transport.abort()
