"""Garbage, pickles and peers without the secret, at every port that is no client's: none is run or served."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry
from tandem.v1 import worker_pb2 as pb

from kvstore.errors import UnprovenPeer
from kvstore.peer_keys import PeerKeys
from services.node import DebugServer, ExchangeMetrics
from services.orders import GrpcOrders, GrpcServer, StreamBroken
from services.orders.grpc_open import INTRODUCTION_KEY
from services.orders.grpc_peers import METADATA_KEY
from tests.exchange.exchange_worker import PEER_KEY, Worker, running
from tests.garbage import PAYLOADS, Touch
from tests.memory_transport import Switchboard

BOUND_S = 20.0


@dataclass(frozen=True)
class Port:
    """One port: where it is, how a peer without the secret comes, and whether those who may are still served."""

    address: str
    come_without_secret: Callable[[], Awaitable[None]]
    check_serves: Callable[[], Awaitable[None]]
    num_strangers: Callable[[], int]


@asynccontextmanager
async def kv_port() -> AsyncIterator[Port]:
    switchboard = Switchboard()
    registry = CollectorRegistry()
    owner = Worker("prefill-0", switchboard, observer=ExchangeMetrics(registry))
    peer = Worker("decode-0", switchboard)
    without = Worker("decode-1", switchboard, keys=())
    async with running(owner, peer, without):

        async def come() -> None:
            with pytest.raises(UnprovenPeer):
                await without.exchange.connect(owner.exchange.address)

        def num_strangers() -> int:
            return int(registry.get_sample_value("tandem:peers_unproven_total", {"port": "kv"}) or 0)

        async def serves() -> None:
            assert await peer.exchange.connect(owner.exchange.address) == "prefill-0"

        yield Port(owner.exchange.address, come, serves, num_strangers)


@asynccontextmanager
async def grpc_port() -> AsyncIterator[Port]:
    keys = PeerKeys((PEER_KEY,))
    server = GrpcServer("127.0.0.1", 0, keys)

    async def serve(order: pb.PrefillRequest, send: Callable[[pb.PrefillEvent], Awaitable[None]]) -> None:
        await send(pb.PrefillEvent(finished=pb.PrefillFinished(token_id=7)))

    server.serve_prefills(serve)
    await server.start()
    address = f"127.0.0.1:{server.port}"

    async def come() -> None:
        orders = GrpcOrders()
        with pytest.raises(StreamBroken, match="UNAUTHENTICATED"):
            async for _ in orders.prefill(address, pb.PrefillRequest()):
                pass
        await orders.close()

    async def serves() -> None:
        orders = GrpcOrders(keys)
        async with asyncio.timeout(BOUND_S):
            assert [event.finished.token_id async for event in orders.prefill(address, pb.PrefillRequest())] == [7]
        await orders.close()

    try:
        yield Port(address, come, serves, lambda: server.num_strangers)
    finally:
        await server.stop(None)


@asynccontextmanager
async def http_port() -> AsyncIterator[Port]:
    async def check() -> None: ...

    server = DebugServer(CollectorRegistry, dict, check, str, str, tokens=("t" * 64,))
    address = await server.start("127.0.0.1", 0)

    async def come() -> None:
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{address}/debug/state")).status_code == 401

    async def serves() -> None:
        async with httpx.AsyncClient(timeout=BOUND_S) as client:
            assert (await client.get(f"http://{address}/health")).status_code == 200

    try:
        yield Port(address, come, serves, lambda: server.num_strangers)
    finally:
        await server.close()


PORTS = {"kv": kv_port, "grpc": grpc_port, "http": http_port}
UNFINISHED = {("kv", "frame without end"), ("http", "http")}
"""What may go on: the rest of a frame, the next request. All else is garbage at once."""


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", PORTS)
async def test_garbage_and_pickles_are_not_run_and_disturb_nobody(name: str, payload: str, tmp_path: Path) -> None:
    async with PORTS[name]() as port:
        host, _, number = port.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        writer.write(PAYLOADS[payload](tmp_path / "loaded"))
        await port.check_serves()
        if (name, payload) in UNFINISHED:
            writer.write_eof()
        async with asyncio.timeout(BOUND_S):
            with suppress(ConnectionResetError):  # an end, too: of what was left unread
                await reader.read()
        writer.close()
        await port.check_serves()
        assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("method", ["PeerService/Introduce", "PrefillService/Prefill", "DecodeService/Session"])
@pytest.mark.parametrize("place", ["message", "introduction", "proof"])
async def test_a_pickle_within_a_call_is_not_run_and_disturbs_nobody(method: str, place: str, tmp_path: Path) -> None:
    data = pickle.dumps(Touch(tmp_path / "loaded"))
    metadata = {"message": (), "introduction": ((INTRODUCTION_KEY, data),), "proof": ((METADATA_KEY, data.hex()),)}
    async with grpc_port() as port, grpc.aio.insecure_channel(port.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(f"/tandem.v1.{method}")(data, metadata=metadata[place], timeout=BOUND_S)
        assert refused.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED)
        await port.check_serves()
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("name", PORTS)
async def test_a_peer_without_the_secret_is_not_served_and_counts(name: str) -> None:
    async with PORTS[name]() as port:
        await port.check_serves()
        assert port.num_strangers() == 0
        await port.come_without_secret()
        await port.check_serves()
        assert port.num_strangers() > 0  # over gRPC he introduces himself anew, and tries again
