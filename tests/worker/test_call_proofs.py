"""Who may give orders to a worker: its peers, each order once, and nobody who has only seen or copied one."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

from kvstore.peer_keys import PeerKeys
from services.orders import GrpcOrders, GrpcServer, StreamBroken
from services.orders.call_proofs import CallerSession, NotProven, WorkerSessions
from services.orders.grpc_peers import METADATA_KEY

KEY, OTHER_KEY = b"the key of these tests" * 2, b"some other secret's key " * 2
OURS, OTHERS, NONE = PeerKeys((KEY,)), PeerKeys((OTHER_KEY,)), PeerKeys()
METHOD = "/tandem.v1.PrefillService/Prefill"


def worker(keys: PeerKeys = OURS, address: str = "w:1") -> WorkerSessions:
    nonces = itertools.count(1)
    sessions = WorkerSessions(keys, lambda: next(nonces).to_bytes(16, "big"))
    sessions.address = address
    return sessions


def introduced(
    to: WorkerSessions, keys: PeerKeys = OURS, address: str = "w:1", nonce: bytes = bytes(16)
) -> CallerSession:
    caller = CallerSession(keys, address, nonce)
    caller.accept(to.introduce(caller.introduction))
    return caller


# ---- the sessions, without gRPC -------------------------------------------------


def test_each_call_of_a_peer_is_taken_once() -> None:
    sessions = worker()
    caller = introduced(sessions)
    calls = [caller.next_call(METHOD) for _ in range(50)]
    random.Random(1).shuffle(calls)
    assert all(sessions.is_proven(METHOD, call) for call in calls)
    assert not any(sessions.is_proven(METHOD, call) for call in calls)


def test_a_call_for_one_method_is_none_for_another() -> None:
    sessions = worker()
    call = introduced(sessions).next_call(METHOD)
    assert not sessions.is_proven("/tandem.v1.DecodeService/Session", call)
    assert sessions.is_proven(METHOD, call)


def test_a_call_proves_nothing_to_another_worker_or_to_the_next_start_of_this_one() -> None:
    caller = introduced(worker())
    again = worker()
    introduced(again)  # whose nonces are the same, which is worse than it can be
    assert not worker().is_proven(METHOD, caller.next_call(METHOD))
    other = worker(address="w:2")
    introduced(other, address="w:2")
    assert not other.is_proven(METHOD, caller.next_call(METHOD))


@pytest.mark.parametrize(
    "call",
    [
        "",
        "x",
        "00 1 00",
        "zz 1 00",
        "00 -1 00",
        "00 0 00",
        f"00 {'9' * 5000} 00",
        f"{'00' * 16} {1 << 70} {'00' * 32}",
        "ö 1 2",
    ],
)
def test_garbage_for_a_proof_is_no_proof(call: str) -> None:
    sessions = worker()
    introduced(sessions)
    assert not sessions.is_proven(METHOD, call)


def test_a_call_that_never_came_holds_up_nothing_and_is_not_taken_later_on() -> None:
    sessions = worker()
    caller = introduced(sessions)
    lost = caller.next_call(METHOD)
    calls = [caller.next_call(METHOD) for _ in range(5000)]
    assert all(sessions.is_proven(METHOD, call) for call in calls)
    assert not any(sessions.is_proven(METHOD, call) for call in [lost, *calls[::97]])


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (OURS, NONE, "w:1 has no peer secret"),
        (OURS, OTHERS, "w:1 has another peer secret"),
    ],
)
def test_a_worker_without_our_secret_gets_no_order(ours: PeerKeys, theirs: PeerKeys, why: str) -> None:
    with pytest.raises(NotProven, match=why):
        introduced(worker(theirs), ours)


def test_a_worker_that_only_claims_to_have_our_secret_gets_no_order() -> None:
    caller = CallerSession(OURS, "w:1", bytes(16))
    for proof in (b"", bytes(32)):
        with pytest.raises(NotProven, match="has not proven itself"):
            caller.accept(pb.IntroductionReply(nonce=bytes(16), key_ids=OURS.ids, proof=proof))


def test_who_stands_between_gets_no_order_for_the_worker_behind_him() -> None:
    """The registry says that the worker is at his address; he asks the real one to prove itself for him."""
    behind = worker(address="real:1")
    caller = CallerSession(OURS, "fake:1", bytes(16))
    with pytest.raises(NotProven, match="fake:1 was dialled, and this is real:1"):
        behind.introduce(caller.introduction)
    lie = pb.Introduction(nonce=bytes(16), key_ids=OURS.ids, address="real:1")
    with pytest.raises(NotProven, match="fake:1 has not proven itself"):
        caller.accept(behind.introduce(lie))


def test_introductions_without_end_push_no_peer_out() -> None:
    sessions = worker()
    caller = introduced(sessions)
    assert sessions.is_proven(METHOD, caller.next_call(METHOD))
    for number in range(2000):
        sessions.introduce(pb.Introduction(nonce=number.to_bytes(16, "big"), key_ids=OURS.ids, address="w:1"))
    assert sessions.is_proven(METHOD, caller.next_call(METHOD))
    assert len(sessions._unproven) == 256


@pytest.mark.parametrize("keys", [(KEY, OTHER_KEY), (OTHER_KEY, KEY)])
def test_a_secret_is_changed_without_a_pause(keys: tuple[bytes, ...]) -> None:
    for caller, sessions in ((OURS, worker(PeerKeys(keys))), (PeerKeys(keys), worker())):
        assert sessions.is_proven(METHOD, introduced(sessions, caller).next_call(METHOD))


# ---- over gRPC ------------------------------------------------------------------


class Worker:
    """Counts the orders that reach it."""

    def __init__(self) -> None:
        self.num_orders = 0

    async def serve_prefill(self, order: pb.PrefillRequest, send: Callable[[pb.PrefillEvent], Awaitable[None]]) -> None:
        self.num_orders += 1
        await send(pb.PrefillEvent(finished=pb.PrefillFinished(token_id=7)))

    async def serve_session(
        self, requests: AsyncIterator[pb.SessionRequest], send: Callable[[pb.SessionFrame], Awaitable[None]]
    ) -> None:
        self.num_orders += 1
        await send(pb.SessionFrame(incarnation="i"))

    @asynccontextmanager
    async def listening(self, keys: PeerKeys = OURS, port: int = 0) -> AsyncIterator[GrpcServer]:
        server = GrpcServer("127.0.0.1", port, keys)
        server.serve_prefills(self.serve_prefill)
        server.serve_sessions(self.serve_session)
        await server.start()
        try:
            yield server
        finally:
            await server.stop(None)


async def order_from(address: str, keys: PeerKeys) -> list[pb.PrefillEvent]:
    orders = GrpcOrders(keys)
    try:
        return [event async for event in orders.prefill(address, pb.PrefillRequest())]
    finally:
        await orders.close()


def dialled(server: GrpcServer) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")


async def hello() -> AsyncIterator[pb.SessionRequest]:
    yield pb.SessionRequest(hello=pb.SessionHello(router_id="r"))


@pytest.mark.parametrize(
    ("caller", "callee", "why"),
    [
        (NONE, OURS, "UNAUTHENTICATED: this worker serves those alone who have its peer secret"),
        (OTHERS, OURS, "has another peer secret"),
        (OURS, NONE, "has no peer secret"),
    ],
)
async def test_no_order_passes_between_those_who_have_no_secret_in_common(
    caller: PeerKeys, callee: PeerKeys, why: str
) -> None:
    target, orders = Worker(), GrpcOrders(caller)
    async with target.listening(callee) as server, asyncio.timeout(60):
        with pytest.raises(StreamBroken, match=why):
            await order_from(f"127.0.0.1:{server.port}", caller)
        with pytest.raises(StreamBroken, match=why):
            async for _ in orders.session(f"127.0.0.1:{server.port}", hello()):
                pass
        await orders.close()
    assert target.num_orders == 0


@pytest.mark.parametrize("method", ["Prefill", "Session"])
@pytest.mark.parametrize("proof", [None, "00 1 00", f"{'00' * 16} 1 {'00' * 32}"])
async def test_a_stranger_generates_nothing_and_is_told_of_nothing(
    method: str, proof: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    target, metadata = Worker(), None if proof is None else ((METADATA_KEY, proof),)
    async with target.listening() as server, asyncio.timeout(60), dialled(server) as channel:
        for _ in range(5):
            if method == "Prefill":
                request = pb.PrefillRequest(prompt_token_ids=range(1000))
                call = worker_pb2_grpc.PrefillServiceStub(channel).Prefill(request, metadata=metadata)
            else:
                # He says nothing yet: gRPC calls it internal where what is being sent meets the refusal.
                call = worker_pb2_grpc.DecodeServiceStub(channel).Session(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _answer in call:
                    pass
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert target.num_orders == 0
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


async def test_probes_need_no_secret() -> None:
    async with Worker().listening() as server, asyncio.timeout(60), dialled(server) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_copied_proof_is_used_up() -> None:
    target = Worker()
    async with target.listening() as server, asyncio.timeout(60):
        address = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(address) as channel:
            session = CallerSession(OURS, address, bytes(16))
            session.accept(await worker_pb2_grpc.PeerServiceStub(channel).Introduce(session.introduction))
            metadata = ((METADATA_KEY, session.next_call(METHOD)),)
            prefill = worker_pb2_grpc.PrefillServiceStub(channel).Prefill
            assert [event async for event in prefill(pb.PrefillRequest(), metadata=metadata)]
            with pytest.raises(grpc.aio.AioRpcError, match="peer secret"):
                assert [event async for event in prefill(pb.PrefillRequest(), metadata=metadata)]
            twice = (*metadata, (METADATA_KEY, session.next_call(METHOD)))
            with pytest.raises(grpc.aio.AioRpcError, match="peer secret"):
                assert [event async for event in prefill(pb.PrefillRequest(), metadata=twice)]
    assert target.num_orders == 1


async def test_a_worker_that_was_restarted_at_its_address_is_met_anew() -> None:
    target, orders = Worker(), GrpcOrders(OURS)
    async with asyncio.timeout(60):
        async with target.listening() as server:
            port = server.port
            assert [event async for event in orders.prefill(f"127.0.0.1:{port}", pb.PrefillRequest())]
        async with target.listening(port=port):
            while target.num_orders < 2:
                try:
                    assert [event async for event in orders.prefill(f"127.0.0.1:{port}", pb.PrefillRequest())]
                except StreamBroken as error:
                    if "UNAUTHENTICATED" in str(error):
                        raise
                    await asyncio.sleep(0.1)  # until the channel has found it again
        await orders.close()
    assert target.num_orders == 2


async def test_many_orders_at_once_need_one_introduction() -> None:
    target, orders = Worker(), GrpcOrders(OURS)
    async with target.listening() as server, asyncio.timeout(60):

        async def order() -> int:
            return len([event async for event in orders.prefill(f"127.0.0.1:{server.port}", pb.PrefillRequest())])

        assert await asyncio.gather(*(order() for _ in range(20))) == [1] * 20
        assert len(server._sessions._proven) == 1
        await orders.close()
