"""A worker at its start: there to be seen before its model is, and nobody sends it anything."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from kvstore.registry import Membership
from kvstore.transport import Transport
from services.engine.native import Engine
from services.prefill.config import PrefillConfig
from services.prefill.service import PrefillService
from services.worker.process import _serve
from tests.hf_models import write_model
from tests.memory_transport import MemoryTransport, Switchboard
from tests.waiting import until

TIMEOUT_S = 60.0


@pytest.fixture
def config(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> PrefillConfig:
    def transports(choice: str, memory: object, name: str, host: str) -> list[Transport]:
        return [MemoryTransport(memory, Switchboard())]  # type: ignore[arg-type]

    monkeypatch.setattr("services.worker.assembly.make_transports", transports)
    model = write_model(tmp_path / "model", "llama3")
    return PrefillConfig(
        model=str(model), redis=redis_url, block_size=16, num_gpu_blocks_override=128, num_threads=1, worker_id="p"
    )


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
