"""A router with fake workers, served over real HTTP from an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from kvstore.block import BlockHash
from kvstore.index.entries import Holding
from kvstore.registry import WorkerRecord
from kvstore.threads import OsThreads
from services.http_server import HttpServer
from services.orders import GrpcOrders
from services.router.config import RouterConfig
from services.router.edge import RouterParts
from services.router.process import Seams, bind, open_parts, server_config
from tests.router.fake_worker import FakeWorker
from tests.waiting import until

T = TypeVar("T")


class FakeMembership:
    """Who is registered, as the test says it."""

    def __init__(self, records: tuple[WorkerRecord, ...] = ()) -> None:
        self._records = records
        self._starting: tuple[WorkerRecord, ...] = ()
        self._callbacks: list[Callable[[tuple[WorkerRecord, ...]], None]] = []

    def snapshot(self) -> tuple[WorkerRecord, ...]:
        return self._records

    def starting(self) -> tuple[WorkerRecord, ...]:
        return self._starting

    def on_change(self, callback: Callable[[tuple[WorkerRecord, ...]], None]) -> None:
        self._callbacks.append(callback)

    def set(self, *records: WorkerRecord) -> None:
        self._records = tuple(record for record in records if not record.phase)
        self._starting = tuple(record for record in records if record.phase)
        for callback in self._callbacks:
            callback(self._records)


@dataclass
class FakeIndex:
    """A prefix index that says what the test wants, or nothing at all."""

    answer: Callable[[Sequence[BlockHash]], Sequence[Holding]] = lambda hashes: ()
    available: bool = True
    hangs: bool = False
    asked: list[Sequence[BlockHash]] = field(default_factory=list)

    async def lookup(self, hashes: Sequence[BlockHash], timeout_s: float) -> Sequence[Holding]:
        self.asked.append(hashes)
        if self.hangs:
            await asyncio.Event().wait()
        return self.answer(hashes) if self.available else ()


@dataclass
class Running:
    """What a test can look into while the router serves."""

    base_url: str
    parts: RouterParts
    membership: FakeMembership
    workers: list[FakeWorker]


@asynccontextmanager
async def running_router(
    config: RouterConfig,
    *workers: FakeWorker,
    extra_records: tuple[WorkerRecord, ...] = (),
    index: Any = None,
):
    """In the current event loop: fake workers, and the router on a free port, ready to serve."""
    config = replace(config, model_grace_s=0.0)  # whoever is there is there at once
    for worker in workers:
        await worker.start()
    membership = FakeMembership((*(worker.record() for worker in workers), *extra_records))
    listener, seams = bind("127.0.0.1", 0), Seams(GrpcOrders(), OsThreads(), time.monotonic, time.time)
    try:
        async with open_parts(config, membership, "router-under-test", seams, index) as parts:
            server = HttpServer(server_config(replace(config, shutdown_timeout_s=2), parts))
            serving = asyncio.create_task(server.serve([listener]))
            names = {name for worker in workers for name in worker.model_names}
            await until(lambda: parts.workers.num_sessions_up == len(workers) and names <= set(parts.models.names()))
            await until(lambda: server.started)
            try:
                yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", parts, membership, list(workers))
            finally:
                server.should_exit = True
                await serving
    finally:
        listener.close()
        for worker in workers:
            await worker.stop()


@dataclass
class ThreadedRouter:
    """The same in a thread, for clients that block."""

    config: RouterConfig
    make_workers: Callable[[], list[FakeWorker]]
    running: Running = field(init=False)

    def __enter__(self) -> ThreadedRouter:
        started: Future[Running] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="router")
        self._thread.start()
        self.running = started.result(timeout=120)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=120)
        assert not self._thread.is_alive()

    @property
    def base_url(self) -> str:
        return self.running.base_url

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the router's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=120)

    async def _serve(self, started: Future[Running]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with running_router(self.config, *self.make_workers()) as running:
                started.set_result(running)
                await self._stop.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)
