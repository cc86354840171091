"""A decode worker within the test's loop: the product's service and engine, blocks moved in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

from tandem.v1 import worker_pb2 as pb

from kvstore.exchange import Outside
from services.decode.config import DecodeConfig
from services.decode.service import DecodeService
from services.elastic.service import ElasticService
from services.engine.native import Engine
from services.orders import Orders
from services.worker import assembly
from services.worker.assembly import Role, Seams
from tests.loop_threads import LoopThreads
from tests.memory_orders import MemoryOrders
from tests.memory_transport import Faults, MemoryTransport, Switchboard
from tests.waiting import until

_SETTINGS: dict[str, object] = {"block_size": 16, "max_model_len": 400, "num_gpu_blocks_override": 40, "device": "cpu"}

Send: TypeAlias = Callable[[pb.SessionFrame], Awaitable[None]]


class DecodeWorker:
    """Not started; see `running`. It has no registry: nobody finds it, and neither index nor stores hear of it."""

    def __init__(
        self,
        name: str,
        model: Path,
        switchboard: Switchboard,
        faults: Faults | None = None,
        orders: Orders | None = None,
        **settings: object,
    ) -> None:
        """`orders`: how it reaches others' prefill halves; None: it has nobody."""
        engine = self._configured(model=str(model), **{**_SETTINGS, **settings})
        seams = Seams(orders or MemoryOrders(), Outside(threads=LoopThreads()), time.time)
        self.transport = MemoryTransport(engine.memory, switchboard, faults, seed=1)
        with patch.object(assembly, "make_transports", lambda *_: [self.transport]):
            self.parts = assembly.assemble(self._config, self._role, engine, name, "1", seams)
        self.service = self._made()

    _role: Role = "decode"

    def _configured(self, **settings: Any) -> Engine:
        self._config: DecodeConfig = DecodeConfig(**settings)
        return Engine.from_config(self._config)

    def _made(self) -> DecodeService | ElasticService:
        return DecodeService(self._config, self.parts)

    async def serve_session(self, orders: AsyncIterator[pb.SessionRequest], send: Send) -> None:
        assert isinstance(self.service, DecodeService)
        await self.service.serve_session(orders, send)

    @property
    def num_free(self) -> int:
        return self.parts.engine.load().num_free_blocks

    async def start(self) -> None:
        await self.parts.exchange.start("127.0.0.1", 0)
        self.parts.thread.start(self.service)

    async def close(self) -> None:
        """End it as a process ends; nothing of it holds a block then."""
        await self.service.close()
        await self.parts.exchange.close()
        await self.service.settle()
        await self.parts.thread.call(self.parts.engine.check_integrity)
        load = self.parts.engine.load()
        assert (load.num_lent_blocks, load.num_free_blocks) == (0, load.num_blocks)
        assert (load.num_running, load.num_waiting) == (0, 0)
        await self.parts.thread.stop()

    def metric(self, series: str, **labels: str) -> float:
        return self.parts.metrics.registry.get_sample_value(series, {**self._labels, **labels}) or 0.0

    @property
    def _labels(self) -> dict[str, str]:
        return {}


@dataclass
class Answer:
    """What a router has heard of one order."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.PositionLogprobs] = field(default_factory=list)
    last: pb.Output | None = None


class RouterOf:
    """A router's session with one worker; see `session`."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self._requests: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()

    def generate(self, order: pb.GenerateRequest) -> Answer:
        self._requests.put_nowait(pb.SessionRequest(generate=order))
        answer = self.answers[order.handle] = Answer()
        return answer

    def tell(self, message: pb.SessionRequest) -> None:
        self._requests.put_nowait(message)

    def move(self, handle: int) -> None:
        self._requests.put_nowait(pb.SessionRequest(move=pb.MoveRequest(handle=handle)))

    def abort(self, handle: int) -> None:
        self._requests.put_nowait(pb.SessionRequest(abort=pb.AbortRequest(handle=handle)))

    async def orders(self) -> AsyncIterator[pb.SessionRequest]:
        yield pb.SessionRequest(hello=pb.SessionHello(router_id="router", protocol_version="2"))
        while True:
            yield await self._requests.get()

    async def send(self, frame: pb.SessionFrame) -> None:
        last = [output for output in frame.outputs if output.finish_reason]
        for output in frame.outputs:
            if not output.finish_reason:
                self._take(output)
        for handle, token_id in zip(frame.handles, frame.token_ids, strict=True):
            self.answers[handle].token_ids.append(token_id)
        for output in last:
            self._take(output)

    def _take(self, output: pb.Output) -> None:
        answer = self.answers[output.handle]
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs
        if output.finish_reason:
            answer.last = output


async def ended(answer: Answer) -> pb.Output:
    await until(lambda: answer.last is not None)
    assert answer.last is not None
    return answer.last


@asynccontextmanager
async def running(*workers: DecodeWorker) -> AsyncIterator[Sequence[RouterOf]]:
    """Start workers, with a router's session with each; close them."""
    routers = [RouterOf() for _ in workers]
    for worker in workers:
        await worker.start()
    sessions = [
        asyncio.create_task(worker.serve_session(router.orders(), router.send))
        for worker, router in zip(workers, routers, strict=True)
    ]
    try:
        yield routers
    finally:
        for task in sessions:
            task.cancel()
        await asyncio.wait(sessions)
        for worker in workers:
            await worker.close()
