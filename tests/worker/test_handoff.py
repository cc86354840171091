"""The decode worker's end of a handoff over gRPC: what becomes of an order whose channel goes away under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

from kvstore.errors import PeerUnreachable
from kvstore.protocol import FetchResult, Reservation
from services.decode.handoff import Handoff, HandoffFailed, prefill_remotely
from services.decode.reservation import PendingReservation
from services.engine.api import Request, SamplingParams
from services.orders import GrpcOrders, grpc_channels


class PrefillWorkerOfTheTest(worker_pb2_grpc.PrefillServiceServicer):
    """Answers no order before the test allows it."""

    def __init__(self) -> None:
        self.num_orders = 0
        self.has_order = asyncio.Event()
        self.may_finish = asyncio.Event()
        self.answer = pb.PrefillEvent(finished=pb.PrefillFinished(token_id=7, finish_reason=pb.FINISH_REASON_LENGTH))

    async def Prefill(
        self, order: pb.PrefillRequest, context: grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillEvent]
    ) -> None:
        self.num_orders += 1
        self.has_order.set()
        await self.may_finish.wait()
        await context.write(self.answer)


@asynccontextmanager
async def prefill_worker() -> AsyncIterator[tuple[PrefillWorkerOfTheTest, str]]:
    server, worker = grpc.aio.server(), PrefillWorkerOfTheTest()
    worker_pb2_grpc.add_PrefillServiceServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield worker, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


class ExchangeOfTheTest:
    """Connects to all but the addresses that are lost; its fetches bring nothing."""

    identity = SimpleNamespace(peer_id="decode-0/1")

    def __init__(self) -> None:
        self.lost: set[str] = set()

    def new_id(self) -> bytes:
        return bytes(16)

    async def connect(self, address: str) -> str:
        if address in self.lost:
            raise PeerUnreachable(f"{address} does not answer")
        return address

    def fetch(self, *_: object) -> Any:
        result: asyncio.Future[FetchResult] = asyncio.get_running_loop().create_future()
        return SimpleNamespace(result=result)


async def nothing_to_reserve(num_blocks: int) -> Reservation:
    raise AssertionError("nobody offers anything")


def hand_over(
    orders: GrpcOrders,
    exchange: ExchangeOfTheTest,
    address: str,
    kv: str = "kv",
    resumed: Sequence[int] = (),
    max_tokens: int = 1,
) -> asyncio.Task[Handoff]:
    hashes: Sequence[None] = [None]
    target = pb.PrefillTarget(worker_id="prefill-0", grpc_address=address, kv_address=kv)
    handing_over = prefill_remotely(
        pb.PrefillRequest(
            request_id="r", resumed_token_ids=resumed, sampling=pb.SamplingParams(max_tokens=len(resumed) + max_tokens)
        ),
        target,
        hashes,
        nothing_to_reserve,
        exchange,  # type: ignore[arg-type]
        orders,
        dispose=lambda fetch: None,
        finish_timeout_s=30,
    )
    return asyncio.ensure_future(handing_over)


async def test_a_channel_closed_under_an_order_is_a_failed_handoff_and_no_cancellation() -> None:
    orders = GrpcOrders()
    async with prefill_worker() as (worker, address), asyncio.timeout(60):
        order = hand_over(orders, ExchangeOfTheTest(), address)
        await worker.has_order.wait()
        await orders.close()
        with pytest.raises(HandoffFailed) as failure:
            await order
        assert failure.value.cause == "rpc"


async def test_the_token_of_a_prefill_worker_that_does_not_know_of_resuming_is_not_used() -> None:
    orders = GrpcOrders()
    async with prefill_worker() as (worker, address), asyncio.timeout(60):
        worker.may_finish.set()
        with pytest.raises(HandoffFailed, match="prefill-0 resumes no output") as failure:
            await hand_over(orders, ExchangeOfTheTest(), address, resumed=[3, 4])
        assert failure.value.cause == "incompatible"
        await orders.close()


@pytest.mark.parametrize("answer", ["refuses", "ends"])
async def test_a_prompt_that_a_prefill_worker_cannot_hold_is_no_error_of_the_clients(answer: str) -> None:
    """Our own engine holds it: its context is longer, or its pool larger."""
    orders = GrpcOrders()
    async with prefill_worker() as (worker, address), asyncio.timeout(60):
        worker.may_finish.set()
        if answer == "refuses":
            error = pb.Error(code=pb.ERROR_CODE_INVALID, message="prompt has 60 tokens; the context of 50 must hold")
            worker.answer = pb.PrefillEvent(failed=error)
        with pytest.raises(HandoffFailed) as failure:
            await hand_over(orders, ExchangeOfTheTest(), address, max_tokens=2)
        assert failure.value.cause == "refused"
        await orders.close()


async def test_an_unreachable_peer_does_not_take_other_requests_orders_with_it() -> None:
    orders, exchange = GrpcOrders(), ExchangeOfTheTest()
    async with prefill_worker() as (worker, address), asyncio.timeout(60):
        order = hand_over(orders, exchange, address)
        await worker.has_order.wait()
        exchange.lost.add("kv")
        with pytest.raises(HandoffFailed):
            await hand_over(orders, exchange, address)
        worker.may_finish.set()
        assert (await order).finished.token_id == 7
        await orders.close()


async def test_an_order_that_is_given_up_is_cancelled_as_its_caller_wished() -> None:
    orders = GrpcOrders()
    async with prefill_worker() as (worker, address), asyncio.timeout(60):
        order = hand_over(orders, ExchangeOfTheTest(), address)
        await worker.has_order.wait()
        order.cancel()
        with pytest.raises(asyncio.CancelledError):
            await order
        await orders.close()


async def test_channels_to_workers_of_the_past_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_channels, "_MAX_CHANNELS", 1)
    orders, exchange = GrpcOrders(), ExchangeOfTheTest()
    opened: list[grpc.aio.Channel] = []
    make_channel = grpc.aio.insecure_channel
    monkeypatch.setattr(
        grpc.aio, "insecure_channel", lambda *a, **k: opened.append(make_channel(*a, **k)) or opened[-1]
    )
    async with prefill_worker() as (old, old_address), prefill_worker() as (new, new_address), asyncio.timeout(60):
        order = hand_over(orders, exchange, old_address)
        await old.has_order.wait()
        new.may_finish.set()
        await hand_over(orders, exchange, new_address)
        # The old one's channel goes once its last order has ended, and no sooner.
        old.may_finish.set()
        assert (await order).finished.token_id == 7
        is_closed = [channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN for channel in opened]
        assert is_closed == [True, False]
        await orders.close()


async def test_a_reservation_whose_exchange_closed_while_it_waited_is_withdrawn_all_the_same() -> None:
    async def call(function: Callable[..., object], *arguments: object) -> object:
        return function(*arguments)

    engine = SimpleNamespace(reserve=lambda *_: None, cancel_reservation=lambda _: True)
    parts: Any = SimpleNamespace(engine=engine, thread=SimpleNamespace(call=call))
    pending = PendingReservation(parts, Request("r", [1], SamplingParams()))
    waiting = asyncio.create_task(pending.reserve(1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await pending.cancel()
