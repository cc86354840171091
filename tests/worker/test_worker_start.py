"""A worker at its start: there to be seen before its model is, and nobody sends it anything."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from kvstore.registry import Membership
from kvstore.transport import Transport
from services.engine.api import StepOutput
from services.engine.native import Engine
from services.prefill.config import PrefillConfig
from services.prefill.service import PrefillService
from services.rates import StepShape
from services.startup import CANNOT_START
from services.worker.assembly import WorkerParts
from services.worker.process import _serve
from tests.hf_models import write_model
from tests.memory_transport import MemoryTransport, Switchboard
from tests.waiting import until

TIMEOUT_S = 60.0


@pytest.fixture
def config(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrefillConfig]:
    def transports(choice: str, memory: object, name: str, host: str) -> list[Transport]:
        return [MemoryTransport(memory, Switchboard())]  # type: ignore[arg-type]

    monkeypatch.setattr("services.worker.assembly.make_transports", transports)
    model = write_model(tmp_path / "model", "llama3")
    yield PrefillConfig(
        model=str(model), redis=redis_url, block_size=16, num_gpu_blocks_override=128, num_threads=1, worker_id="p"
    )
    gc.unfreeze()  # what a worker that serves has frozen is the tests' own


@pytest.fixture
def may_load(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The model is loaded when this is set."""
    event, load = threading.Event(), Engine.from_config

    def wait_and_load(*arguments: object, **options: object) -> Engine:
        assert event.wait(TIMEOUT_S)
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "from_config", wait_and_load)
    return event


async def test_a_worker_is_seen_as_starting_before_it_serves(config: PrefillConfig, may_load: threading.Event) -> None:
    membership = Membership(config.redis)
    await membership.start()
    worker = asyncio.create_task(_serve(config, "prefill", lambda parts: PrefillService(config, parts)))
    await until(lambda: bool(membership.starting()) or worker.done())
    (starting,) = membership.starting()
    assert (starting.worker_id, starting.phase, membership.snapshot()) == ("p", "loading the model", ())
    async with httpx.AsyncClient(base_url=f"http://{starting.http_address}", timeout=TIMEOUT_S) as http:
        for page, word in (("/health", "unhealthy"), ("/ready", "not ready")):
            answer = await http.get(page)
            assert (answer.status_code, answer.json()) == (503, {"status": word, "reason": "loading the model"})
        assert (await http.get("/debug/state")).json() == {"role": "prefill", "phase": "loading the model"}
        assert (await http.get("/metrics")).status_code == 200
        may_load.set()
        await until(lambda: bool(membership.snapshot()) or worker.done())
        assert gc.get_freeze_count() > 0, "a full collection would look at all that was loaded"
        (serving,) = membership.snapshot()
        assert (serving.incarnation, serving.num_blocks, membership.starting()) == (starting.incarnation, 128, ())
        assert (serving.http_address, serving.grpc_address) == (starting.http_address, starting.grpc_address)
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).json() == {"status": "ready"}
        assert "tandem:kv_blocks" in (await http.get("/metrics")).text
    os.kill(os.getpid(), signal.SIGTERM)
    assert await worker == 0
    await until(lambda: membership.snapshot() == ())
    await membership.close()


async def test_a_worker_that_is_told_to_stop_while_it_loads_does_not_load_to_the_end(
    config: PrefillConfig, may_load: threading.Event
) -> None:
    membership = Membership(config.redis)
    await membership.start()
    worker = asyncio.create_task(_serve(config, "prefill", lambda parts: PrefillService(config, parts)))
    await until(lambda: bool(membership.starting()) or worker.done())
    os.kill(os.getpid(), signal.SIGTERM)
    assert await worker is None
    await until(lambda: membership.starting() == ())
    await membership.close()
    may_load.set()


def building(config: PrefillConfig, made: list[WorkerParts]) -> Callable[[WorkerParts], PrefillService]:
    """Have `made` hold the worker's parts once it is built."""

    def build(parts: WorkerParts) -> PrefillService:
        made.append(parts)
        return PrefillService(config, parts)

    return build


@pytest.fixture
def may_warm_up(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The first step ends when this is set."""
    event, warm_up = threading.Event(), Engine.warm_up

    def wait_and_warm_up(engine: Engine) -> Sequence[StepOutput]:
        assert event.wait(TIMEOUT_S)
        return warm_up(engine)

    monkeypatch.setattr(Engine, "warm_up", wait_and_warm_up)
    return event


async def test_nobody_is_sent_anything_before_the_first_steps_have_told_how_fast_the_machine_is(
    config: PrefillConfig, may_warm_up: threading.Event
) -> None:
    made: list[WorkerParts] = []
    membership = Membership(config.redis)
    await membership.start()
    worker = asyncio.create_task(
        _serve(config, "prefill", lambda parts: made.append(parts) or PrefillService(config, parts))
    )
    await until(lambda: bool(made) or worker.done())
    (starting,) = membership.starting()
    async with httpx.AsyncClient(base_url=f"http://{starting.http_address}", timeout=TIMEOUT_S) as http:
        while (answer := await http.get("/ready")).json().get("reason") != "warming up":
            assert answer.status_code == 503
        assert (membership.snapshot(), made[0].rates.rates.num_steps) == ((), 0)
        may_warm_up.set()
        await until(lambda: bool(membership.snapshot()) or worker.done())
        assert made[0].rates.rates.num_steps > 0
        watch = made[0].thread.watch
        assert watch.allowed_s() == config.stuck_after_s
        step_s = made[0].rates.rates.step_s(StepShape(num_prompt_tokens=10**9))
        with patch.object(made[0].engine, "step_shape", StepShape(num_prompt_tokens=10**9)):
            assert watch.allowed_s() == 10 * step_s > config.stuck_after_s
    os.kill(os.getpid(), signal.SIGTERM)
    assert await worker == 0
    await membership.close()


@pytest.mark.parametrize("is_told_to_stop", [False, True])
async def test_first_steps_that_do_not_end_are_the_end_of_the_start(
    config: PrefillConfig, may_warm_up: threading.Event, is_told_to_stop: bool
) -> None:
    config = replace(config, warm_up_timeout_s=TIMEOUT_S if is_told_to_stop else 0.01)
    made: list[WorkerParts] = []
    worker = asyncio.create_task(
        _serve(config, "prefill", lambda parts: made.append(parts) or PrefillService(config, parts))
    )
    await until(lambda: bool(made) or worker.done())
    if is_told_to_stop:
        os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: getattr(made[0].thread._runner, "_stopping", False) or worker.done())
    may_warm_up.set()
    assert await worker == (0 if is_told_to_stop else CANNOT_START)
