"""What anybody may ask of a worker over gRPC costs it next to nothing, whatever he sends along."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

from kvstore.peer_keys import PeerKeys
from services.orders import GrpcOrders, GrpcServer, StreamBroken, grpc_open, grpc_orders
from services.orders.call_proofs import CallerSession
from tests.waiting import until

KEYS = PeerKeys((b"the key of these tests" * 2,))
HUGE = bytes(32 << 20)
SERVING = health_pb2.HealthCheckResponse.SERVING
WORKER = """
import asyncio
from kvstore.peer_keys import PeerKeys
from services.orders import GrpcServer

async def main():
    server = GrpcServer("127.0.0.1", 0, PeerKeys((b"the key of these tests" * 2,)))
    await server.start()
    print(server.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


IDLE = """
import asyncio
from services.orders import GrpcOrders, GrpcServer, grpc_orders
import grpc
from tandem.v1 import worker_pb2 as pb

grpc_orders._SILENCE_OPTIONS = (("grpc.max_connection_idle_ms", 50),)

async def serve(order, send):
    await send(pb.PrefillEvent(finished=pb.PrefillFinished(token_id=7)))

async def main():
    server, orders = GrpcServer("127.0.0.1", 0), GrpcOrders()
    server.serve_prefills(serve)
    await server.start()
    assert [event async for event in orders.prefill(f"127.0.0.1:{server.port}", pb.PrefillRequest())]
    (kept,) = orders._channels._channels.values()
    while (state := kept.proven.channel.get_state()) is not grpc.ChannelConnectivity.IDLE:
        await kept.proven.channel.wait_for_state_change(state)
    await orders.close()
    await server.stop(None)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[str, int]]:
    """The address and the process of a worker's gRPC port."""
    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}", process.pid
        finally:
            process.kill()


def peak_mb(pid: int) -> float:
    """The most memory that a process has had so far."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e3


async def send_all(
    address: str, method: str, message: bytes, metadata: tuple[tuple[str, bytes], ...] = ()
) -> Counter[str]:
    """Send a message over four connections at once; what comes of it."""

    async def send() -> str:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            try:
                await channel.unary_unary(method)(message, metadata=metadata, timeout=120)
            except grpc.aio.AioRpcError as error:
                return str(error.details())
            return "OK"

    return Counter(await asyncio.gather(*(send() for _ in range(4))))


async def test_a_strangers_large_messages_are_not_read(worker: tuple[str, int]) -> None:
    address, pid = worker
    introduction = CallerSession(KEYS, address, bytes(16)).introduction
    metadata = ((grpc_open.INTRODUCTION_KEY, introduction.SerializeToString()),)
    assert await send_all(address, "/grpc.health.v1.Health/Check", b"") == {"OK": 4}
    before_mb = peak_mb(pid)
    assert await send_all(address, "/grpc.health.v1.Health/Check", HUGE) == {"OK": 4}
    assert await send_all(address, "/tandem.v1.PeerService/Introduce", HUGE, metadata) == {"OK": 4}
    (refusal,) = await send_all(address, "/tandem.v1.PrefillService/Prefill", HUGE)
    assert "peer secret" in refusal
    assert peak_mb(pid) - before_mb < 16


async def test_of_strangers_that_come_as_the_version_before_one_message_is_read(worker: tuple[str, int]) -> None:
    said = await send_all(worker[0], "/tandem.v1.PeerService/Introduce", HUGE)
    too_large, unread = "it is too large, or has not come", "messages are not read for a while"
    assert set(said) == {f"this is no introduction: {why}" for why in (too_large, unread)}


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel]]:
    server = GrpcServer("127.0.0.1", 0, KEYS)
    await server.start()
    try:
        async with asyncio.timeout(60), grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, channel
    finally:
        await server.stop(None)


async def test_peers_of_the_version_before_introduce_themselves_by_message() -> None:
    async with listening() as (server, channel):
        session = CallerSession(KEYS, f"127.0.0.1:{server.port}", bytes(16))
        session.accept(await worker_pb2_grpc.PeerServiceStub(channel).Introduce(session.introduction))


@pytest.mark.parametrize("by", ["metadata", "message"])
async def test_what_is_no_introduction_is_refused(by: str) -> None:
    metadata = ((grpc_open.INTRODUCTION_KEY, b"\xff"),) if by == "metadata" else ()
    async with listening() as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError, match="no introduction"):
            await channel.unary_unary("/tandem.v1.PeerService/Introduce")(b"\xff", metadata=metadata)


async def test_watches_without_end_are_bounded_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as (server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(grpc_open._MAX_WATCHES)]
        assert [(await watch.read()).status for watch in watches] == [SERVING] * len(watches)
        with pytest.raises(grpc.aio.AioRpcError, match="others watch"):
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
        for watch in watches:
            watch.cancel()
        await until(lambda: not server._health._num_watches)
        monkeypatch.setattr(grpc_open, "_WATCH_S", 0.01)
        assert [each.status async for each in stub.Watch(health_pb2.HealthCheckRequest())] == [SERVING]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def head(path: bytes) -> bytes:
    """A call's headers, uncompressed: POST, http, the path, an authority, and what gRPC needs."""
    needed = b"\x40\x0ccontent-type\x10application/grpc" + b"\x40\x02te\x08trailers"
    return b"\x83\x86" + bytes([0x44, len(path)]) + path + b"\x41\x01x" + needed


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = frame(4, 0, 0, b"") + frame(4, 1, 0, b"")
HEADERS, END_HEADERS, PING, ACK = 1, 4, 6, 1
CALLS = {
    "a call without its end": b"/grpc.health.v1.Health/Check",
    "an introduction without its message": b"/tandem.v1.PeerService/Introduce",
    "an order without its message": b"/tandem.v1.PrefillService/Prefill",
    "no method of ours": b"/a.B/C",
    "a watch": b"/grpc.health.v1.Health/Watch",
}
SILENT = {
    "nothing": b"",
    "preface": PREFACE,
    "settings": PREFACE + SETTINGS,
    "half a head": PREFACE + SETTINGS + frame(HEADERS, 0, 1, head(b"/x")[:10]),
    "half a frame": PREFACE + SETTINGS + frame(HEADERS, END_HEADERS, 1, head(b"/x"))[:-3],
    **{what: PREFACE + SETTINGS + frame(HEADERS, END_HEADERS, 1, head(path)) for what, path in CALLS.items()},
}


async def say_and_answer_pings(address: str, said: bytes) -> None:
    """Return when the other end closes the connection."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(said)
    try:
        while True:
            start = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(start[:3], "big"))
            if start[3] == PING and not start[4] & ACK:
                writer.write(frame(PING, ACK, 0, payload))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        writer.close()


def test_a_connection_that_is_closed_as_nothing_is_called_is_no_news() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}  # which is set here, too
    command = [sys.executable, "-c", IDLE]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_silent_connection_has_twenty_seconds_at_most() -> None:
    shipped = dict(grpc_orders._SILENCE_OPTIONS)
    assert shipped["grpc.server_handshake_timeout_ms"] <= 20_000
    assert 2 * shipped["grpc.max_connection_idle_ms"] <= 20_000  # gRPC looks once in that time


@pytest.mark.slow
async def test_silent_connections_are_closed_as_shipped(worker: tuple[str, int]) -> None:
    """Each within the minute that one alone was given before; a watch has a minute, and is silent from then on."""
    ends = {what: asyncio.create_task(say_and_answer_pings(worker[0], said)) for what, said in SILENT.items()}
    watch = ends.pop("a watch")
    _, open_still = await asyncio.wait(ends.values(), timeout=50)
    assert not [what for what, end in ends.items() if end in open_still]
    async with asyncio.timeout(150):
        await watch


async def test_connections_without_end_do_not_take_all_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = dict(grpc_orders._SILENCE_OPTIONS)
    assert 0 < shipped["grpc.max_allowed_incoming_connections"] < 1024
    monkeypatch.setattr(grpc_orders, "_SILENCE_OPTIONS", (("grpc.max_allowed_incoming_connections", 3),))
    async with listening() as (server, _):
        ends = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(8)]
        closed = [asyncio.ensure_future(reader.read()) for reader, _ in ends]
        await until(lambda: sum(each.done() for each in closed) == 5)
        for _, writer in ends:
            writer.close()


@pytest.mark.parametrize("order", ["prefill", "session"])
async def test_who_pretends_to_be_a_worker_makes_us_read_nothing_large(order: str) -> None:
    async def introduce(messages: AsyncIterator[bytes], context: object) -> pb.IntroductionReply:
        return pb.IntroductionReply(nonce=HUGE)

    handler = grpc.stream_unary_rpc_method_handler(
        introduce, response_serializer=pb.IntroductionReply.SerializeToString
    )
    impostor = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    impostor.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("tandem.v1.PeerService", {"Introduce": handler}),)
    )
    address = f"127.0.0.1:{impostor.add_insecure_port('127.0.0.1:0')}"
    await impostor.start()
    orders = GrpcOrders(KEYS)

    async def say() -> AsyncIterator[pb.SessionRequest]:
        yield pb.SessionRequest()

    try:
        async with asyncio.timeout(60):
            with pytest.raises(StreamBroken, match="larger than max"):
                await anext(
                    orders.session(address, say())
                    if order == "session"
                    else orders.prefill(address, pb.PrefillRequest())
                )
    finally:
        await orders.close()
        await impostor.stop(None)
