"""An elastic worker that computes nothing: it says what load the test gives it, and takes roles, or does not."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

from tandem.v1 import worker_pb2 as pb

from kvstore.registry import WorkerRecord
from services.orders import BUDGETS
from tests.worker_records import worker_record

_numbers = itertools.count(1)


class BendingWorker:
    """One incarnation. `role` is what it begins with."""

    def __init__(self, worker_id: str, role: str, takes: bool = True, features: tuple[str, ...] = (BUDGETS,)) -> None:
        self.takes = takes
        """Whether it does what it is told; else the message is lost on the way."""
        self.told: list[pb.Budgets] = []
        self.began_as = role
        self._features = features
        self._news = asyncio.Event()
        self.load = pb.Load(num_blocks=1000, num_free_blocks=900)
        self.load.rates.base_s, self.load.rates.prompt_token_s, self.load.rates.num_steps = 0.01, 2e-4, 100
        self.load.rates.running_s, self.load.rates.context_token_s, self.load.rates.prompt_pair_s = 2e-4, 2e-7, 2e-8
        self.load.budgets.role = role
        self.load.budgets.tpot_s = 0.04 if role == "prefill" else 0.032
        if role == "decode":
            self.load.budgets.prompt_tokens = 128
        self.record: WorkerRecord = worker_record(
            worker_id=worker_id,
            incarnation=f"{next(_numbers):024x}",
            role="elastic",
            served_model_names=("tiny",),
            grpc_address=worker_id,
            transports=("memory",),
            max_num_seqs=64,
            num_blocks=25_000,
            block_size=16,
        )

    @property
    def role(self) -> str:
        return self.load.budgets.role

    def say(self) -> None:
        """A frame with its load, soon."""
        self._news.set()

    async def serve(
        self, requests: AsyncIterator[pb.SessionRequest], send: Callable[[pb.SessionFrame], Awaitable[None]]
    ) -> None:
        await send(pb.SessionFrame(load=self.load, incarnation=self.record.incarnation, features=self._features))
        reading = asyncio.create_task(self._read(requests))
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                await send(pb.SessionFrame(load=self.load))
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _read(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        async for message in requests:
            if message.HasField("budgets"):
                self.told.append(message.budgets)
                if self.takes:
                    self.load.budgets.CopyFrom(message.budgets)
                    self.say()
