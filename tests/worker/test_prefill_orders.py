"""How a prefill worker's orders end: what is counted and logged, and that nothing stays pinned."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from kvstore.protocol import LeaseOutcome
from kvstore.threads import OsThreads, Threads
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.prefill.config import PrefillConfig
from services.prefill.order import OrderEvent
from services.prefill.service import PrefillService
from services.rates import RateLearner
from services.worker.engine_thread import EngineThread
from tests.hf_models import random_prompts, write_model
from tests.loop_threads import LoopThreads
from tests.waiting import until


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

    async def send(self, event: pb.PrefillEvent) -> None:
        if event.WhichOneof("kind") == self._hangs_up_at:
            self.heard = event
            self.has_heard.set()
            await asyncio.Event().wait()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    torch.set_num_threads(1)
    model = write_model(tmp_path / "model", "llama3")
    config = EngineConfig(
        str(model), device="cpu", block_size=16, max_model_len=400, num_gpu_blocks_override=25, max_num_seqs=1
    )
    engine = Engine.from_config(config)
    yield engine
    engine.check_integrity()
    assert engine.load().num_lent_blocks == 0


@pytest.fixture(params=[OsThreads, LoopThreads])
def threads(request: pytest.FixtureRequest) -> Threads:
    made: Threads = request.param()
    return made


class World:
    """A prefill service over a real engine; its leases are the test's to close."""

    def __init__(self, engine: Engine, threads: Threads, max_num_waiting: int = 1024) -> None:
        self.outcomes: list[str] = []
        self.leases: list[LeaseOfTheTest] = []
        self.thread = EngineThread(engine, threads)
        metrics = SimpleNamespace(
            order_ended=self.outcomes.append,
            refused=lambda reason: None,
            watch_service=lambda *_: None,
            requests=SimpleNamespace(prefilled=lambda timeline: None),
        )
        parts = SimpleNamespace(
            worker_id="prefill-0",
            engine=engine,
            thread=self.thread,
            threads=threads,
            clock=time.time,
            exchange=SimpleNamespace(open_lease=self.open_lease),
            rates=RateLearner(),
            metrics=metrics,
        )
        config = PrefillConfig(model="model", max_num_waiting=max_num_waiting)
        self.service = PrefillService(config, parts)  # type: ignore[arg-type]
        self.thread.start(self.service)

    def open_lease(self, *_: object) -> LeaseOfTheTest:
        self.leases.append(LeaseOfTheTest())
        return self.leases[-1]

    def order(self, caller: Caller, transfer_id: bytes = bytes(16), timeout_s: float = 0.0) -> asyncio.Task[None]:
        order = pb.PrefillRequest(
            request_id="r",
            prompt_token_ids=random_prompts([100])[0],
            sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=1),
            transfer_id=transfer_id,
            reader_peer_id="decode-0/1",
            timeout_s=timeout_s,
        )
        return asyncio.create_task(self.service.serve_prefill(order, caller.send))

    async def close(self) -> None:
        for lease in self.leases:
            if not lease.closed.done():
                lease.closed.set_result(LeaseOutcome.RELEASED)
        await self.service.settle()
        await self.thread.stop()


@pytest.mark.parametrize(("hangs_up_at", "outcome"), [("finished", "finished"), ("scheduled", "cancelled")])
async def test_an_order_counts_as_finished_from_its_last_event_on(
    engine: Engine, threads: Threads, hangs_up_at: str, outcome: str
) -> None:
    world, caller = World(engine, threads), Caller(hangs_up_at)
    async with asyncio.timeout(60):
        call = world.order(caller)
        await caller.has_heard.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert world.outcomes == [outcome]
        await world.close()


async def test_an_order_that_breaks_is_no_cancelled_one_and_its_caller_hears_so(
    engine: Engine, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> LeaseOfTheTest:
        raise ValueError("the transfer has a lease already")

    world, caller = World(engine, threads), Caller("failed")
    monkeypatch.setattr(world.service._parts.exchange, "open_lease", refuse)
    async with asyncio.timeout(60):
        call = world.order(caller)
        await caller.has_heard.wait()
        assert caller.heard.failed.code == pb.ERROR_CODE_INTERNAL
        assert "a lease already" in caller.heard.failed.message
        call.cancel()
        await asyncio.wait([call])
        assert world.outcomes == ["failed"]
        await world.close()


@pytest.mark.parametrize("at", ["chunk", "the end"])
async def test_an_announcement_that_fails_costs_its_order_and_no_block(
    engine: Engine, threads: Threads, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def announce(lease: LeaseOfTheTest, first_index: int, blocks: list[object], last: bool) -> None:
        if last or at == "chunk":
            raise ValueError("blocks out of order")

    monkeypatch.setattr(LeaseOfTheTest, "announce", announce)
    world, caller = World(engine, threads), Caller("failed")
    async with asyncio.timeout(60):
        call = world.order(caller)
        await caller.has_heard.wait()
        assert (caller.heard.failed.code, world.leases[0].closed.done()) == (pb.ERROR_CODE_INTERNAL, True)
        call.cancel()
        await asyncio.wait([call])
        assert world.outcomes == ["failed"]
        await world.close()


async def test_orders_are_bounded_before_they_reach_the_queue(engine: Engine, threads: Threads) -> None:
    world, slow, late = World(engine, threads, max_num_waiting=1), Caller("scheduled"), Caller("failed")
    async with asyncio.timeout(60):
        calls = [world.order(slow, bytes([number]) * 16) for number in range(2)]
        await slow.has_heard.wait()
        calls.append(world.order(late))
        await late.has_heard.wait()
        assert late.heard.failed.code == pb.ERROR_CODE_OVERLOADED
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert world.outcomes == ["refused", "cancelled", "cancelled"]
        await world.close()


async def test_orders_of_a_worker_that_stands_still_fail_at_once_wherever_they_are(engine: Engine) -> None:
    world = World(engine, OsThreads(), max_num_waiting=1)
    is_standing, goes_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        is_standing.set()
        assert goes_on.wait(30)

    world.thread.post(stand_still)
    callers = [Caller("failed"), Caller("failed")]
    async with asyncio.timeout(60):
        assert await asyncio.to_thread(is_standing.wait, 30)
        waiting = world.order(callers[0])  # for the engine's thread
        await until(lambda: world.service._orders)
        world.service.set_stuck("step loop")
        await callers[0].has_heard.wait()
        late = world.order(callers[1], bytes([1]) * 16)
        await callers[1].has_heard.wait()
        for caller in callers:
            assert caller.heard.failed.code == pb.ERROR_CODE_UNAVAILABLE
        assert "no progress: step loop" in callers[0].heard.failed.message
        goes_on.set()
        for call in (waiting, late):
            call.cancel()
        await asyncio.wait([waiting, late])
        await world.thread.call(lambda: None)
        assert engine.load().num_waiting == engine.load().num_running == 0
        await world.close()


@pytest.mark.parametrize("stage", ["fetch", "queue", "compute"])
async def test_an_orders_time_out_ends_its_work_in_every_stage(
    engine: Engine, threads: Threads, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    world, caller = World(engine, threads), Caller("failed")
    cancelled, report = asyncio.Event(), world.service._report

    def report_first(order: object, event: OrderEvent, *rest: object) -> None:
        if event is OrderEvent.BEGUN:
            report(order, event)  # type: ignore[arg-type]

    async def prepare(_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with asyncio.timeout(60):
        room = None
        if stage == "queue":  # somebody has all the blocks
            room = await world.thread.call(engine.take_prefix, [bytes([number]) * 16 for number in range(25)])
            assert room is not None
        if stage == "fetch":
            monkeypatch.setattr(world.service, "_prepare", prepare)
        if stage == "compute":  # no news comes after the first, which opens the lease
            monkeypatch.setattr(world.service, "_report", report_first)
        call = world.order(caller, timeout_s=600 if stage == "compute" else 0.05)
        if stage == "compute":  # not before it is there, however slow the machine is
            await until(lambda: world.leases)
            (order,) = world.service._orders
            world.service._expire(order)
        await caller.has_heard.wait()
        assert caller.heard.failed.code == pb.ERROR_CODE_DEADLINE
        assert cancelled.is_set() == (stage == "fetch")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert world.outcomes == ["expired"]
        assert len(world.leases) == (stage == "compute")
        assert [lease.closed.done() for lease in world.leases] == [True] * len(world.leases)
        if room is not None:
            await world.thread.call(engine.release_blocks, room.block_ids)
        await world.close()
        load = engine.load()
    assert (load.num_waiting, load.num_running, load.num_lent_blocks) == (0, 0, 0)


async def test_a_drain_whose_time_is_up_ends_orders_so_that_they_go_on_elsewhere(engine: Engine) -> None:
    world, caller = World(engine, LoopThreads()), Caller("failed")
    async with asyncio.timeout(60):
        room = await world.thread.call(engine.take_prefix, [bytes([number]) * 16 for number in range(25)])
        assert room is not None
        call = world.order(caller)
        await until(lambda: engine.load().num_waiting)
        await world.service.drain(0.0)
        await caller.has_heard.wait()
        assert (caller.heard.failed.code, world.outcomes) == (pb.ERROR_CODE_UNAVAILABLE, [])
        call.cancel()
        await asyncio.wait([call])
        await world.thread.call(engine.release_blocks, room.block_ids)
        await world.close()
