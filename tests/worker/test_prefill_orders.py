"""How a prefill worker's orders end: what is counted and logged, and that nothing stays pinned."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from kvstore.lease import LeaseOutcome
from services.engine.config import EngineConfig
from services.engine.engine import Engine
from services.prefill.service import PrefillService
from services.worker.engine_thread import EngineThread
from services.worker.fetch_costs import FetchCosts
from tests.hf_models import random_prompts, write_model


class LeaseOfTheTest:
    """Open until the test closes it, or the service revokes it."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[LeaseOutcome] = asyncio.get_running_loop().create_future()

    def announce(self, first_index: int, blocks: list[object], last: bool) -> None: ...

    def revoke(self, reason: str) -> None:
        self.closed.set_result(LeaseOutcome.REVOKED)


class Caller:
    """A decode worker that hangs up when it has an event of one kind, before the prefill worker knows it was sent."""

    def __init__(self, hangs_up_at: str) -> None:
        self._hangs_up_at = hangs_up_at
        self.has_heard = asyncio.Event()

    async def write(self, event: pb.PrefillEvent) -> None:
        if event.WhichOneof("kind") == self._hangs_up_at:
            self.has_heard.set()
            await asyncio.Event().wait()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    torch.set_num_threads(1)
    model = write_model(tmp_path / "model", "llama3")
    config = EngineConfig(str(model), device="cpu", block_size=16, max_model_len=400, num_gpu_blocks_override=25)
    engine = Engine.from_config(config)
    yield engine
    engine.check_integrity()
    assert engine.load().num_lent_blocks == 0


@pytest.mark.parametrize(("hangs_up_at", "outcome"), [("finished", "finished"), ("scheduled", "cancelled")])
async def test_an_order_counts_as_finished_from_its_last_event_on(
    engine: Engine, hangs_up_at: str, outcome: str
) -> None:
    outcomes: list[str] = []
    leases: list[LeaseOfTheTest] = []

    def open_lease(*_: object) -> LeaseOfTheTest:
        leases.append(LeaseOfTheTest())
        return leases[-1]

    thread = EngineThread(engine)
    requests = SimpleNamespace(prefilled=lambda timeline: None)
    metrics = SimpleNamespace(order_ended=outcomes.append, watch_service=lambda *_: None, requests=requests)
    service = PrefillService(
        SimpleNamespace(
            worker_id="prefill-0",
            engine=engine,
            thread=thread,
            exchange=SimpleNamespace(open_lease=open_lease),
            fetcher=SimpleNamespace(costs=FetchCosts()),
            metrics=metrics,
        )  # type: ignore[arg-type]
    )
    thread.start(service)
    order = pb.PrefillRequest(
        request_id="r",
        prompt_token_ids=random_prompts([100])[0],
        sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=1),
        transfer_id=bytes(16),
        reader_peer_id="decode-0/1",
    )
    caller = Caller(hangs_up_at)
    call = asyncio.create_task(service.Prefill(order, caller))  # type: ignore[arg-type]
    async with asyncio.timeout(30):
        await caller.has_heard.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert outcomes == [outcome]
        (lease,) = leases
        if not lease.closed.done():
            lease.closed.set_result(LeaseOutcome.RELEASED)
        await service.settle()
        await thread.stop()
