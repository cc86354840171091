"""A decode worker's requests: whatever becomes of one, its router hears of its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from tandem.v1 import worker_pb2 as pb

from services.decode.config import DecodeConfig
from services.decode.service import DecodeService


class MetricsOfTheTest:
    """Counts nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class ThreadOfTheTest:
    """An engine's thread that runs nothing."""

    def call(self, *_: object) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()


class FetcherOfTheTest:
    """Its channel was closed: what grpc.aio raises then looks like an order to stop."""

    async def restore(self, hashes: object) -> None:
        raise asyncio.CancelledError


class RouterOfTheTest:
    """A session in which one request is ordered."""

    def __init__(self, order: pb.GenerateRequest) -> None:
        self._order = order
        self.outputs: asyncio.Queue[pb.Output] = asyncio.Queue()

    async def orders(self) -> AsyncIterator[pb.SessionRequest]:
        yield pb.SessionRequest(hello=pb.SessionHello(router_id="router", protocol_version="1"))
        yield pb.SessionRequest(generate=self._order)
        await asyncio.get_running_loop().create_future()

    async def write(self, frame: pb.SessionFrame) -> None:
        for output in frame.outputs:
            self.outputs.put_nowait(output)


async def test_a_cancellation_that_nobody_ordered_does_not_leave_a_request_without_an_end() -> None:
    parts = SimpleNamespace(
        worker_id="decode-0",
        incarnation="1",
        engine=SimpleNamespace(
            layout=SimpleNamespace(model_fingerprint="model", block_size=16), load=lambda: pb.Load(num_blocks=1)
        ),
        thread=ThreadOfTheTest(),
        fetcher=FetcherOfTheTest(),
        metrics=MetricsOfTheTest(),
    )
    service = DecodeService(DecodeConfig(model="model"), parts)  # type: ignore[arg-type]
    service._load = pb.Load  # type: ignore[method-assign]
    order = pb.GenerateRequest(
        handle=1,
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=1),
        timeout_s=600,
    )
    router = RouterOfTheTest(order)
    session = asyncio.create_task(service.Session(router.orders(), router))  # type: ignore[arg-type]
    async with asyncio.timeout(30):
        output = await router.outputs.get()
        assert (output.finish_reason, output.error.code) == (pb.FINISH_REASON_ERROR, pb.ERROR_CODE_INTERNAL)
        assert "nobody had ordered" in output.error.message
        await service.drain(1)
        session.cancel()
        await asyncio.wait([session])
