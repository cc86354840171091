"""Processes listen on, and are found at, IPv6 addresses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import httpx
import pytest
from prometheus_client import CollectorRegistry
from tandem.v1 import worker_pb2 as pb

from kvstore.peer_keys import PeerKeys
from services.node import DebugServer
from services.orders import GrpcOrders, GrpcServer
from services.startup import CannotListen, address_of
from tests.exchange.exchange_worker import Worker, running
from tests.memory_transport import Switchboard

KEYS = PeerKeys((b"the key of these tests" * 2,))


@pytest.fixture(autouse=True)
def _has_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")


async def test_orders_reach_a_worker_at_an_ipv6_address() -> None:
    async def serve(order: pb.PrefillRequest, send: Callable[[pb.PrefillEvent], Awaitable[None]]) -> None:
        await send(pb.PrefillEvent(finished=pb.PrefillFinished(token_id=7)))

    server, orders = GrpcServer("::1", 0, KEYS), GrpcOrders(KEYS)
    server.serve_prefills(serve)
    await server.start()
    try:
        async with asyncio.timeout(60):
            events = [event async for event in orders.prefill(address_of("::1", server.port), pb.PrefillRequest())]
        assert [event.finished.token_id for event in events] == [7]
    finally:
        await orders.close()
        await server.stop(None)


async def test_a_debug_port_serves_at_an_ipv6_address() -> None:
    async def check() -> None: ...

    server = DebugServer(CollectorRegistry, dict, check, str, str)
    address = await server.start("::1", 0)
    try:
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(f"http://{address}/health")).status_code == 200
    finally:
        await server.close()


async def test_blocks_are_lent_at_an_ipv6_address() -> None:
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard)
    await owner.exchange.start("::1", 0)
    async with running(reader):
        port = int(owner.exchange.address.rpartition(":")[2])
        assert await reader.exchange.connect(address_of("::1", port)) == "prefill-0"
    await owner.exchange.close()


def test_a_port_that_is_taken_is_named_as_it_is_written() -> None:
    assert "listen on [::1]:7000: taken" in str(CannotListen("::1", 7000, "--port", "taken"))
    assert address_of("10.0.0.1", 80) == "10.0.0.1:80"
    assert address_of("prefill-0.tandem", 80) == "prefill-0.tandem:80"
