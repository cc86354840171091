"""What every carrier of work orders promises, whatever carries them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import worker_pb2 as pb

from kvstore.peer_keys import PeerKeys
from services.orders import (
    GrpcOrders,
    GrpcServer,
    OrderServer,
    StreamBroken,
    StreamRefused,
    WorkerSilent,
    grpc_channels,
    grpc_orders,
)
from tests.memory_orders import MemoryOrders, MemoryServer
from tests.ports import free_port
from tests.relay import FAR_HOST, Relays

KEYS = PeerKeys((b"the key of these tests" * 2,))


@pytest.fixture(params=["grpc", "proven", "memory"])
def carrier(request: pytest.FixtureRequest):
    """Opens a server that `register` says what to serve: gives the orders to it, its address and how to stop it."""

    @asynccontextmanager
    async def grpc(register: Callable[[OrderServer], None], keys: PeerKeys = PeerKeys()):  # noqa: B008
        server, orders = GrpcServer("127.0.0.1", 0, keys), GrpcOrders(keys)
        register(server)
        await server.start()
        try:
            yield orders, f"127.0.0.1:{server.port}", lambda: server.stop(None)
        finally:
            await orders.close()
            await server.stop(None)

    @asynccontextmanager
    async def memory(register: Callable[[OrderServer], None]):
        server = MemoryServer()
        register(server)
        orders = MemoryOrders(worker=server)
        yield orders, "worker", server.stop
        await orders.close()

    return {"grpc": grpc, "proven": partial(grpc, keys=KEYS), "memory": memory}[request.param]


async def say(*router_ids: str) -> AsyncIterator[pb.SessionRequest]:
    for router_id in router_ids:
        yield pb.SessionRequest(hello=pb.SessionHello(router_id=router_id))
    await asyncio.Event().wait()


async def echo(requests: AsyncIterator[pb.SessionRequest], send: Callable[[pb.SessionFrame], Awaitable[None]]) -> None:
    """Answers until it is told to end, to fail or to refuse."""
    async for request in requests:
        word = request.hello.router_id
        if word == "end":
            return
        if word == "fail":
            raise RuntimeError("a bug")
        if word == "refuse":
            raise StreamRefused("overrun", "too much of it")
        await send(pb.SessionFrame(incarnation=word))


async def test_requests_and_frames_arrive_in_order_and_the_server_ends_the_stream(carrier) -> None:
    async with carrier(lambda server: server.serve_sessions(echo)) as (orders, address, _), asyncio.timeout(60):
        frames = [frame.incarnation async for frame in orders.session(address, say("a", "b", "c", "end"))]
        assert frames == ["a", "b", "c"]


@pytest.mark.parametrize(("word", "message"), [("fail", "fail|bug|Unexpected"), ("refuse", "too much of it")])
async def test_a_server_that_fails_or_refuses_breaks_its_stream_and_no_other(carrier, word: str, message: str) -> None:
    async with carrier(lambda server: server.serve_sessions(echo)) as (orders, address, _), asyncio.timeout(60):
        other = orders.session(address, say("a", "end"))
        assert (await anext(other)).incarnation == "a"
        with pytest.raises(StreamBroken, match=message):
            async for _frame in orders.session(address, say("b", word)):
                pass
        assert [frame async for frame in other] == []


async def test_closing_an_order_cancels_it_at_the_server(carrier) -> None:
    was_cancelled = asyncio.Event()

    async def serve(order: pb.PrefillRequest, send: Callable[[pb.PrefillEvent], Awaitable[None]]) -> None:
        await send(pb.PrefillEvent(failed=pb.Error(message=order.request_id)))
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    async with carrier(lambda server: server.serve_prefills(serve)) as (orders, address, _), asyncio.timeout(60):
        async with aclosing(orders.prefill(address, pb.PrefillRequest(request_id="r"))) as events:
            assert (await anext(events)).failed.message == "r"
        await was_cancelled.wait()


async def test_a_server_that_goes_breaks_its_streams_and_is_nobody_afterwards(carrier) -> None:
    has_begun = asyncio.Event()

    async def serve(order: pb.PrefillRequest, send: Callable[[pb.PrefillEvent], Awaitable[None]]) -> None:
        has_begun.set()
        await asyncio.Event().wait()

    async with carrier(lambda server: server.serve_prefills(serve)) as (orders, address, stop), asyncio.timeout(60):
        order = asyncio.ensure_future(anext(orders.prefill(address, pb.PrefillRequest())))
        await has_begun.wait()
        await stop()
        with pytest.raises(StreamBroken):
            await order


async def test_an_address_without_a_server_breaks_the_stream(carrier) -> None:
    async with carrier(lambda server: server.serve_sessions(echo)) as (orders, _, _), asyncio.timeout(60):
        with pytest.raises(StreamBroken):
            await anext(orders.session("127.0.0.1:1", say("a")))


async def test_one_who_is_cancelled_while_waiting_is_cancelled(carrier) -> None:
    async with carrier(lambda server: server.serve_sessions(echo)) as (orders, address, _), asyncio.timeout(60):
        frames = orders.session(address, say("a"))
        await anext(frames)
        waiting = asyncio.ensure_future(anext(frames))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
async def test_who_connects_to_a_worker_and_says_nothing_of_use_is_closed(monkeypatch, said):
    monkeypatch.setattr(grpc_orders, "_SILENCE_OPTIONS", (("grpc.server_handshake_timeout_ms", 100),))
    server = GrpcServer("127.0.0.1", 0)
    await server.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(said)
        async with asyncio.timeout(20):
            await reader.read()  # at most the server's own settings come before the end
        writer.close()
    finally:
        await server.stop(None)


@pytest.mark.parametrize("keys", [PeerKeys(), KEYS], ids=["open", "proven"])
async def test_a_connection_to_a_worker_without_calls_is_closed_and_opened_again_for_the_next(monkeypatch, keys):
    monkeypatch.setattr(grpc_orders, "_SILENCE_OPTIONS", (("grpc.max_connection_idle_ms", 100),))
    calls = 0

    async def serve(order, send):
        nonlocal calls
        calls += 1
        await send(pb.PrefillEvent(scheduled=pb.PrefillScheduled()))

    server, orders = GrpcServer("127.0.0.1", 0, keys), GrpcOrders(keys)
    server.serve_prefills(serve)
    await server.start()
    try:
        for _ in range(2):
            async with aclosing(orders.prefill(f"127.0.0.1:{server.port}", pb.PrefillRequest())) as events:
                assert [event.WhichOneof("kind") async for event in events] == ["scheduled"]
            (kept,) = orders._channels._channels.values()
            channel = kept.proven.channel
            async with asyncio.timeout(20):
                while channel.get_state() is not grpc.ChannelConnectivity.IDLE:
                    await channel.wait_for_state_change(channel.get_state())
        assert calls == 2
    finally:
        await orders.close()
        await server.stop(None)


async def test_whoever_asks_a_worker_for_its_health_hears_whether_it_should_get_work():
    server = GrpcServer("127.0.0.1", 0, KEYS)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            for is_serving in (True, False, True):
                server.set_serving(is_serving)
                async with asyncio.timeout(60):
                    assert (await statuses.read()).status == (1 if is_serving else 2)
    finally:
        await server.stop(None)


@asynccontextmanager
async def workers_behind_relays(keys: PeerKeys, num_workers: int = 1):
    """Workers that say once that an order is scheduled, and nothing more; their addresses and ports."""

    async def serve(order, send):
        await send(pb.PrefillEvent(scheduled=pb.PrefillScheduled()))
        await asyncio.Event().wait()

    ports = [free_port() for _ in range(num_workers)]
    servers = [GrpcServer("127.0.0.1", port, keys, FAR_HOST) for port in ports]
    with Relays(ports) as relays:
        for server in servers:
            server.serve_prefills(serve)
            await server.start()
        try:
            yield relays, [f"{FAR_HOST}:{port}" for port in ports], ports
        finally:
            for server in servers:
                await server.stop(None)


async def is_scheduled(orders: GrpcOrders, address: str) -> bool:
    async with aclosing(orders.prefill(address, pb.PrefillRequest())) as events:
        return (await anext(events)).WhichOneof("kind") == "scheduled"


async def test_an_order_whose_connection_leads_nowhere_ends_by_the_silence_and_the_next_has_another():
    orders = GrpcOrders(KEYS, silence_s=2)
    async with workers_behind_relays(KEYS) as (relays, (address,), (port,)), asyncio.timeout(60):
        async with aclosing(orders.prefill(address, pb.PrefillRequest())) as events:
            assert (await anext(events)).WhichOneof("kind") == "scheduled"
            relays.forget(port)
            with pytest.raises(WorkerSilent, match="no answer for 2 s"):
                await anext(events)
        assert await is_scheduled(orders, address)
        await orders.close()


async def test_who_falls_silent_takes_the_idle_connections_with_it():
    orders = GrpcOrders(silence_s=2)
    async with workers_behind_relays(PeerKeys(), 2) as (relays, (one, other), ports), asyncio.timeout(60):
        for address in (one, other):
            assert await is_scheduled(orders, address)
        relays.forget(*ports)
        with pytest.raises(WorkerSilent):
            await is_scheduled(orders, one)
        assert await is_scheduled(orders, other)  # at once: it was dialled anew
        await orders.close()


async def test_a_worker_is_not_blamed_for_the_time_in_which_we_stood_still(monkeypatch):
    ask, stood_still = grpc_channels._Channel.ask, asyncio.Event()

    async def stand_still_once(self):
        if not stood_still.is_set():
            stood_still.set()
            time.sleep(4)  # noqa: ASYNC251
        await ask(self)
        answered.set()

    monkeypatch.setattr(grpc_channels._Channel, "ask", stand_still_once)
    orders, answered = GrpcOrders(silence_s=3), asyncio.Event()
    async with workers_behind_relays(PeerKeys()) as (_, (address,), _), asyncio.timeout(60):
        async with aclosing(orders.prefill(address, pb.PrefillRequest())) as events:
            assert (await anext(events)).WhichOneof("kind") == "scheduled"
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.wait([waiting, asyncio.ensure_future(answered.wait())], return_when="FIRST_COMPLETED")
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])
        await orders.close()
