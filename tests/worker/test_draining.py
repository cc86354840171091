"""A worker that was told to drain over HTTP: it drains for as long as any, and then waits for its signal."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from services.worker.process import _drained
from tests.waiting import until


@pytest.mark.parametrize("crashes", [False, True])
async def test_without_a_signal_too_the_time_to_drain_is_bounded(crashes: bool) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    allowed_s: list[float] = []
    has_drained = asyncio.Event()

    async def drain(timeout_s: float) -> None:
        allowed_s.append(timeout_s)
        await has_drained.wait()

    parts: Any = SimpleNamespace(worker_id="decode-0", thread=SimpleNamespace(crashed=loop.create_future()))
    worker: Any = SimpleNamespace(parts=parts, service=SimpleNamespace(drain=drain))
    config: Any = SimpleNamespace(drain_timeout_s=7.0)
    draining = asyncio.create_task(_drained(config, worker, stop))
    await until(lambda: allowed_s == [7.0])
    has_drained.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not draining.done()
    if crashes:
        parts.thread.crashed.set_result(RuntimeError("a step raised"))
    else:
        stop.set()
    assert await draining is not crashes
