"""Asks the bench's worker without a router between: what a latency through a router has in it besides the router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from tandem.v1 import worker_pb2 as pb

from services.orders import GrpcOrders


class DirectWorker:
    """A session with the worker, as a router has one. Use it by `async with`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._orders = asyncio.Queue[pb.SessionRequest]()
        self._first: dict[int, asyncio.Future[float]] = {}
        self._ended: dict[int, asyncio.Future[None]] = {}
        self._last_handle = 0

    async def __aenter__(self) -> DirectWorker:
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def ask(self, prompt: list[int], num_tokens: int) -> float:
        """Returns when the first token came, by the monotonic clock, once the last one has."""
        loop, handle = asyncio.get_running_loop(), self._last_handle + 1
        self._last_handle = handle
        first, ended = self._first[handle], self._ended[handle] = loop.create_future(), loop.create_future()
        order = pb.GenerateRequest(handle=handle, request_id=str(handle), prompt_token_ids=prompt)
        order.sampling.max_tokens = num_tokens
        self._orders.put_nowait(pb.SessionRequest(generate=order))
        await ended
        return await first

    async def _requests(self) -> AsyncIterator[pb.SessionRequest]:
        while True:
            yield await self._orders.get()

    async def _read(self) -> None:
        async for frame in GrpcOrders().session(self._address, self._requests()):
            for output in frame.outputs:
                if (first := self._first.pop(output.handle, None)) is not None:
                    first.set_result(time.monotonic())
                if output.finish_reason:
                    self._ended.pop(output.handle).set_result(None)
