"""Runs one worker process: builds the parts, announces, serves, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import uvloop

import services
from kvstore.errors import RegistryError, TransportError
from kvstore.exchange import Outside
from kvstore.registry import Registrar, WorkerRecord, next_incarnation
from services.activity import Activity, activity_logged, sample
from services.engine.api import Engine
from services.engine.model_config import ModelError
from services.logs import configure_logging, detail_level, report_phase, report_ready
from services.node import hindering, in_words, loop_watch, transport_watches, watched
from services.orders import GrpcOrders, GrpcServer, OrderServer
from services.peer_settings import PeerProofs
from services.settings import SettingsError
from services.startup import CANNOT_START, CannotListen, address_of
from services.worker.assembly import Role, Seams, WorkerParts, assemble, served_names
from services.worker.config import WorkerConfig
from services.worker.engine_thread import EngineThread, StepListener
from services.worker.http import WorkerHttp
from services.worker.load import load_engine, warmed_up
from services.worker.pool_pages import pool_backed

log = logging.getLogger(__name__)

# How long calls that are still open may take to end by themselves when the worker closes.
_GRPC_GRACE_S = 1.0


class WorkerService(StepListener, Protocol):
    """A role's gRPC service, as the process sees it."""

    def register(self, server: OrderServer) -> None: ...

    def state(self) -> dict[str, object]: ...

    def set_stuck(self, stuck: str) -> None:
        """A part of the worker stands still (empty: no longer): take nothing on, and tell whoever waits."""

    def begin_drain(self) -> None:
        """Refuse new work from now on, and let others take over what runs."""

    async def drain(self, timeout_s: float) -> None:
        """Do that, and return when the running work is done or gone, or has been ended since the time is up."""

    async def close(self) -> None:
        """End what still runs, with an error to whoever waits for it."""

    async def settle(self) -> None:
        """Wait, with the exchange closed, until all that transfers held has been given back."""


def run_worker(config: WorkerConfig, role: Role, build: Callable[[WorkerParts], WorkerService]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status: 1 if the engine crashed, 2 if it could not start."""
    configure_logging(config.log_level, config.log_format, fields={"role": role, "worker_id": config.worker_id})
    status = uvloop.run(_serve(config, role, build))
    if status is None:
        os._exit(0)  # the model is being loaded still, by a thread that an orderly end would pull the ground from under
    return status


def shared_path(model: str) -> str:
    """A directory by its absolute path, since the router has another working directory; a hub name as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model


@dataclass(frozen=True)
class Front:
    """What of a worker is there before its model: its name, and its ports."""

    worker_id: str
    incarnation: str
    host: str
    server: GrpcServer
    http: WorkerHttp
    http_address: str


@dataclass(frozen=True)
class RunningWorker:
    """A worker that listens, and what it says of itself in the registry."""

    parts: WorkerParts
    service: WorkerService
    record: WorkerRecord
    server: GrpcServer


@asynccontextmanager
async def open_front(config: WorkerConfig, role: Role, proofs: PeerProofs) -> AsyncIterator[Front]:
    """The ports, of which HTTP answers already; closed at the end. Raises CannotListen."""
    host = config.advertise_host or config.host
    server = GrpcServer(config.host, config.port, proofs.orders, host)
    http = WorkerHttp(role, proofs.tokens, config.open_metrics)
    try:
        http_address = await http.start(config.host, config.http_port)
    except OSError as error:
        raise CannotListen(config.host, config.http_port, "--http-port", error.strerror) from error
    try:
        worker_id = config.worker_id or f"{role}-{host}-{server.port}"
        yield Front(
            worker_id=worker_id,
            incarnation=await next_incarnation(config.redis, worker_id),
            host=host,
            server=server,
            http=http,
            http_address=address_of(host, http_address.rsplit(":", 1)[1]),
        )
    finally:
        await http.close()
        await server.stop(None)


@asynccontextmanager
async def open_worker(
    config: WorkerConfig,
    role: Role,
    engine: Engine,
    build: Callable[[WorkerParts], WorkerService],
    seams: Seams,
    front: Front,
) -> AsyncIterator[RunningWorker]:
    """Everything that serves, up and listening but not announced; closed at the end.

    Closing goes from the outside in: calls end, then transfers, then what they held is settled, then the engine.
    Raises CannotListen, TransportError.
    """
    async with contextlib.AsyncExitStack() as cleanup:
        parts = assemble(config, role, engine, front.worker_id, front.incarnation, seams)
        service = build(parts)
        service.register(front.server)
        _close_at_the_end(cleanup, parts, service, front.server)

        try:
            await parts.exchange.start(config.host, config.kv_port)
        except OSError as error:
            raise CannotListen(config.host, config.kv_port, "--kv-port", error.strerror) from error
        parts.thread.start(service)
        await front.server.start()
        front.http.watch(parts, service.state)
        parts.metrics.exchange.watch_port("grpc", lambda: front.server.num_strangers)
        await parts.index_feed.start()
        cleanup.push_async_callback(parts.index_feed.close)
        if parts.store_feed is not None:
            await parts.store_feed.start(parts.kv_address)
            cleanup.push_async_callback(parts.store_feed.close)
        yield RunningWorker(parts, service, _record(config, role, front, parts), front.server)


def _close_at_the_end(
    cleanup: contextlib.AsyncExitStack, parts: WorkerParts, service: WorkerService, server: GrpcServer
) -> None:
    """Close from the last to the first: end calls, end transfers, settle what they held, stop the engine."""
    cleanup.push_async_callback(parts.thread.stop)
    cleanup.push_async_callback(parts.host_prefixes.settle)
    cleanup.push_async_callback(parts.fetcher.settle)
    cleanup.push_async_callback(parts.orders.close)
    cleanup.push_async_callback(service.settle)
    cleanup.push_async_callback(parts.exchange.close)
    cleanup.push_async_callback(server.stop, _GRPC_GRACE_S)
    cleanup.push_async_callback(service.close)


def _starting_record(config: WorkerConfig, role: Role, front: Front) -> WorkerRecord:
    """Return the worker's record for the registry before its model is there."""
    return WorkerRecord(
        worker_id=front.worker_id,
        role=role,
        incarnation=front.incarnation,
        served_model_names=served_names(config),
        model_path=shared_path(config.model),
        tokenizer_path=shared_path(config.tokenizer or config.model),
        revision=config.revision,
        model_fingerprint="",
        grpc_address=address_of(front.host, front.server.port),
        kv_address="",
        http_address=front.http_address,
        block_size=config.block_size,
        num_blocks=0,
        max_model_len=0,
        max_num_seqs=0,
        dtype="",
        transports=(),
        colocated=bool(getattr(config, "colocated", False)),
        local_prefill_max_tokens=int(getattr(config, "local_prefill_max_tokens", 0)),
        version=services.__version__,
        started_unix_s=time.time(),
        phase=front.http.phase,
    )


def _record(config: WorkerConfig, role: Role, front: Front, parts: WorkerParts) -> WorkerRecord:
    """Return the record of the worker that serves."""
    engine = parts.engine
    return msgspec.structs.replace(
        _starting_record(config, role, front),
        model_fingerprint=engine.layout.model_fingerprint,
        kv_address=parts.kv_address,
        num_blocks=engine.capabilities.num_blocks,
        max_model_len=engine.capabilities.max_model_len,
        max_num_seqs=engine.capabilities.max_num_seqs,
        dtype=engine.capabilities.kv_cache_dtype,
        transports=parts.exchange.transport_names,
        layout=engine.layout.to_wire(),
        is_simulation=engine.capabilities.is_simulation,
        numerics=engine.capabilities.numerics,
        is_exact=engine.capabilities.is_exact,
        adapters=engine.capabilities.adapters,
        phase="",
    )


@asynccontextmanager
async def _announced(config: WorkerConfig, record: WorkerRecord) -> AsyncIterator[Registrar]:
    """A worker in the registry, until the end or the body's own `close`."""
    registrar = Registrar(config.redis, record, lease_s=config.lease_s)
    await registrar.start()
    try:
        yield registrar
    finally:
        await registrar.close()


async def _serve(config: WorkerConfig, role: Role, build: Callable[[WorkerParts], WorkerService]) -> int | None:
    """Load, serve, drain. Return the exit status; None if the end came while a thread still loads the model."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        proofs = config.read_peer_proofs()
        seams = Seams(GrpcOrders(proofs.orders, config.peer_timeout_s), Outside(), time.time, proofs.blocks)
        async with open_front(config, role, proofs) as front:
            # The id is known now, given or made of the port.
            configure_logging(config.log_level, config.log_format, fields={"role": role, "worker_id": front.worker_id})
            front.http.phase = "loading the model"
            async with _announced(config, _starting_record(config, role, front)) as registrar:
                engine = await load_engine(config, seams.outside.threads, stop)
                if engine is None:
                    return None
                report_phase("warming up")
                front.http.phase = "opening transports"
                registrar.update(_starting_record(config, role, front))
                async with open_worker(config, role, engine, build, seams, front) as worker:
                    return await _serve_open(config, worker, front, registrar, stop)
    except (CannotListen, ModelError, RegistryError, SettingsError, TransportError) as error:
        log.error("%s worker cannot start: %s", role, error)
        return CANNOT_START


async def _serve_open(
    config: WorkerConfig, worker: RunningWorker, front: Front, registrar: Registrar, stop: asyncio.Event
) -> int:
    parts, record = worker.parts, worker.record
    parts.metrics.index.watch_registry(lambda: registrar.connected)
    front.http.phase = "warming up"
    if not await warmed_up(parts, config.warm_up_timeout_s, stop):
        return 0
    gc.collect()
    gc.freeze()  # torch and the model stay: a full collection that looks at them stops all threads for 0.1 s and more
    front.http.phase = ""
    registrar.update(record)
    try:
        text = "%s serves on %s, debug http://%s"
        log.log(detail_level(), text, parts.worker_id, record.grpc_address, record.http_address)
        report_phase("registered")
        report_ready(http=record.http_address, about=_about(parts.engine))
        activity = Activity(lambda: sample(parts.metrics.registry), parts.metrics.requests.handoffs_s)
        level = logging.DEBUG if config.disable_log_stats else detail_level()
        async with activity_logged(activity.line, level), _watched(config, worker, front, registrar):
            with pool_backed(parts.engine.memory, parts.threads):
                if not await _has_ended(_any_of(stop, front.http.drain_asked), parts.thread):
                    return 1
            front.http.phase = "draining"
            worker.server.set_serving(False)
            registrar.update(msgspec.structs.replace(registrar.record, draining=True))
            worker.service.begin_drain()
            return 0 if await _drained(config, worker, stop) else 1
    finally:
        await registrar.close()  # before what it has announced is gone


async def _drained(config: WorkerConfig, worker: RunningWorker, stop: asyncio.Event) -> bool:
    """Drain, and wait for the signal if it was not that which said so; False for the engine's crash."""
    parts = worker.parts
    log.log(detail_level(), "%s drains for at most %g s", parts.worker_id, config.drain_timeout_s)
    if not await _has_ended(worker.service.drain(config.drain_timeout_s), parts.thread):
        return False
    if not stop.is_set():
        log.info("%s has drained, and ends when it is told to", parts.worker_id)
    return await _has_ended(stop.wait(), parts.thread)


@asynccontextmanager
async def _watched(
    config: WorkerConfig, worker: RunningWorker, front: Front, registrar: Registrar
) -> AsyncIterator[None]:
    """Have it watched that the worker gets on. Where it does not, probes, routers and who waits for it are told."""
    parts = worker.parts

    # Who decodes computes by itself what it cannot have moved. Its streams would pay for a new start.
    is_needed = not worker.record.decodes

    def on_change(still: tuple[str, ...]) -> None:
        front.http.stuck = stuck = in_words(hindering(still, parts.exchange, is_needed))
        worker.service.set_stuck(stuck)
        worker.server.set_serving(front.http.is_ready)
        phase = f"no progress of: {stuck}" if stuck else ""
        registrar.update(msgspec.structs.replace(registrar.record, phase=phase))

    transports = transport_watches(parts.exchange, config.stuck_after_s, lambda: is_needed)
    watches = [loop_watch(config.stuck_after_s), parts.thread.watch, *transports]
    async with watched(watches, config.stuck_exit_s, parts.threads, on_change) as dog:
        parts.metrics.progress.watch(dog)
        yield


async def _any_of(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _about(engine: Engine) -> str:
    """What computes here, and with how much room, in a few words."""
    compute, layout = engine.capabilities.compute, engine.layout
    weights = layout.dtype if compute["quantization"] == "none" else compute["quantization"]
    if (kept := engine.capabilities.kv_cache_dtype) != layout.dtype:
        weights = f"KV in {kept}" if compute["quantization"] == "none" else f"{weights}, KV in {kept}"
    if engine.capabilities.is_simulation:
        weights = f"SIMULATED, no weights, {weights}"
    where = f"{compute['kernels']} kernels" if compute["device"] == "cpu" else compute["device"]
    return f"{weights}, {where}, {engine.capabilities.num_blocks} blocks of {layout.block_size} tokens"


async def _has_ended(work: Coroutine[Any, Any, object], thread: EngineThread) -> bool:
    """Wait for it, or for the engine's crash; False for the crash."""
    task = asyncio.ensure_future(work)
    either: list[asyncio.Future[Any]] = [task, thread.crashed]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not task.cancel():
        task.result()  # an error there is ours, and no end of the work
    return not thread.crashed.done()
