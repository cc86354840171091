"""Runs one router process from its settings to its exit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import uvicorn
import uvloop

from kvstore.errors import RegistryError
from kvstore.index import IndexReader
from kvstore.registry import Home, Membership, WorkerRecord, open_home
from kvstore.threads import OsThreads, Threads
from services.activity import Activity, activity_logged, sample
from services.http_server import HttpLimits, HttpServer, bound_unsent, bounded
from services.logs import configure_logging, detail_level, launched, report_phase, report_ready
from services.machine import bound_heaps
from services.orders import GrpcOrders, Orders
from services.peer_settings import PeerProofs
from services.router.admission import Admission
from services.router.app import make_app
from services.router.config import RouterConfig
from services.router.edge import Limits, RequestMemory, RouterParts
from services.router.finished import Finished
from services.router.fleet import Headroom, Placer, PrefixFinder, Workers
from services.router.fleet_metrics import FleetCollector
from services.router.listening import listen
from services.router.metrics import RouterMetrics
from services.router.objectives import ObjectiveTable
from services.router.processes import Member
from services.router.readiness import readiness
from services.router.roles import REDIS_TIMEOUT_S, Controller, Ledger, Settings
from services.router.routing import DecisionLog, Policy
from services.router.sharing import Quotas, Shares, open_quotas, read_shares
from services.router.tenants import Keyring
from services.router.text import (
    ChatTemplateError,
    ModelDirectory,
    TokenizerError,
    TokenizerPool,
    check_overrides,
)
from services.router.views import answer
from services.settings import SettingsError
from services.startup import CANNOT_START, CannotListen, address_of, check_registry

log = logging.getLogger(__name__)

# A thread that computes lets the event loop have its turn after so long; Python's own 5 ms add up, turn by turn.
_SWITCH_INTERVAL_S = 0.001
# Containers that may be made, and not have gone, before a collection: to look at so many takes a millisecond.
_NEW_OBJECTS = 10_000
# After its time-out, until a client has been told that its request is cut.
_LAST_WORDS_S = 3
# How long a process that takes another's place waits for what that could serve, before it takes connections.
_WARM_S = 5.0


def run_router(config: RouterConfig, member: Member | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. `member`: as one of several processes on a port."""
    number: dict[str, object] = {} if member is None else {"process": member.start.number}
    configure_logging(config.log_level, config.log_format, fields={"role": "router"}, shown=number)
    # The pool has its own threads; the library's would fight the event loop for the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bound_heaps()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        proofs = config.read_peer_proofs()
        check_registry(config.redis)
        check_overrides(config.tokenizer, config.chat_template)
        read_shares(config.tenants_file)
        if Keyring(config.read_api_keys(), config.read_tenant_secret()).needs_tenant_secret:
            log.warning("no --tenant-secret-file: a tenant's cached blocks are lost to it when one of its keys changes")
    except (ChatTemplateError, RegistryError, SettingsError, TokenizerError) as error:
        log.error("router cannot start: %s", error)
        return CANNOT_START
    return uvloop.run(_serve(config, proofs, member))


@dataclass(frozen=True)
class Seams:
    """The ways in which a router reaches its outside; `main()` chooses, the tests choose otherwise."""

    orders: Orders
    threads: Threads
    clock: Callable[[], float]  # runs evenly: of deadlines and durations
    unix_clock: Callable[[], float]  # Unix time, of requests' timelines


@asynccontextmanager
async def open_parts(
    config: RouterConfig,
    membership: Membership,
    router_id: str,
    seams: Seams,
    index: IndexReader | None = None,
    quotas: Quotas | None = None,
    siblings: Member | None = None,
    home: Home | None = None,
) -> AsyncIterator[RouterParts]:
    """Everything that the application works with; closed at the end. What was given stays the caller's. `home`: the
    Redis in which routers agree who leads elastic workers; None: nobody does."""
    metrics, threads, clock, unix_clock = RouterMetrics(), seams.threads, seams.clock, seams.unix_clock
    wanted = frozenset(config.served_model_name)
    models = ModelDirectory(
        config.tokenizer,
        config.chat_template,
        config.generation_config == "auto",
        threads,
        clock,
        unix_clock,
        wanted,
        config.model_grace_s,
    )

    def serves(record: WorkerRecord) -> bool:
        return not wanted or bool(wanted & set(record.model_names))

    workers = Workers(
        membership, router_id, seams.orders, clock, config.reconnect_max_s, serves, config.silence_timeout_s
    )
    pool = TokenizerPool(
        threads,
        config.tokenizer_pool_size,
        config.tokenizer_queue,
        config.client_share,
        lambda: metrics.count_refusal("tokenizer_full"),
    )
    memory = RequestMemory(
        config.request_memory_bytes, config.client_share, threads, lambda: metrics.count_refusal("memory_full")
    )
    shares = read_shares(config.tenants_file)
    objectives, policy = config.read_objectives(), Policy(config.routing_policy)
    bends = bool(objectives) and policy is Policy.KV  # the others know no costs to bend by
    admission = _make_admission(config, metrics, workers, shares, bends, clock)
    quotas = quotas or Quotas(None, router_id, clock)
    metrics.quotas_shared.set_function(lambda: quotas.is_shared)
    prefixes = PrefixFinder(index, metrics, config.index_timeout_s, clock)
    placer = Placer(workers, policy, DecisionLog(config.routing_history), clock, unix_clock)
    placer.on_redirect = metrics.count_redirect

    def on_news() -> None:
        admission.fill()
        placer.look()

    workers.on_news = on_news
    metrics.registry.register(FleetCollector(workers))
    ledger = Ledger(config.controller_window_s, clock)
    controller = _make_controller(config, objectives, workers, ledger, admission, home, router_id, metrics, seams)

    def on_finished(finished: Finished) -> None:
        metrics.count_objectives(finished)
        ledger.finished(finished)
        if finished.finish_reason != "error":
            placer.answers.observe(finished.model, finished.num_generated_tokens)

    workers.start()
    controller.start()
    models.follow(workers.records, workers.starting)
    membership.on_change(lambda snapshot: models.follow(workers.records, workers.starting))
    try:
        limits = Limits(quotas, metrics)
        yield RouterParts(
            config,
            models,
            workers,
            pool,
            memory,
            admission,
            metrics,
            prefixes,
            placer,
            shares,
            objectives,
            limits,
            ledger.arrived,
            on_finished,
            controller,
            clock,
            unix_clock,
            siblings,
        )
    finally:
        await controller.close()
        await workers.close()
        await models.close()
        pool.close()
        await memory.close()


def _make_admission(
    config: RouterConfig,
    metrics: RouterMetrics,
    workers: Workers,
    shares: Shares,
    bends: bool,
    clock: Callable[[], float],
) -> Admission:
    return Admission(
        config.max_concurrent_requests,
        config.max_queue,
        clock,
        metrics.count_refusal,
        Headroom(workers, config.worker_backlog_s, bends),
        lambda client: shares.of_client(client).weight,
        config.client_share,
    )


def _make_controller(
    config: RouterConfig,
    objectives: ObjectiveTable,
    workers: Workers,
    ledger: Ledger,
    admission: Admission,
    home: Home | None,
    router_id: str,
    metrics: RouterMetrics,
    seams: Seams,
) -> Controller:
    """Leads elastic workers, once it is started and where no other router does."""
    return Controller(
        workers,
        ledger,
        admission.num_queued_tokens,
        home,
        router_id,
        objectives.of_fleet,
        Settings(
            window_s=config.controller_window_s,
            hold_s=config.controller_window_s / 3,
            dwell_s=config.controller_dwell_s,
            # As late as a worker's word may be before it counts as silent.
            max_age_s=max(config.silence_timeout_s, 3.0),
        ),
        config.controller == "auto",
        metrics,
        seams.clock,
        seams.unix_clock,
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; bound here so that port 0 can be told to the launcher. Raises OSError."""
    listener = listen(host, port)
    bound_unsent(listener)
    return listener


async def _serve(config: RouterConfig, proofs: PeerProofs, member: Member | None) -> int:
    try:
        membership = Membership(config.redis)
        index = IndexReader(config.redis)
        listener = bind(config.host, config.port) if member is None else member.listener
    except RegistryError as error:
        log.error("router cannot start: %s", error)
        return CANNOT_START
    except OSError as error:
        log.error("router cannot start: %s", CannotListen(config.host, config.port, "--port", error.strerror))
        return CANNOT_START
    bound_unsent(listener)  # also where another process has bound it
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await membership.start()
    await index.start()
    try:
        router_id = _router_id(config, listener.getsockname()[1], member)
        num_routers = 1 if member is None else member.start.num_processes
        seams = Seams(GrpcOrders(proofs.orders), OsThreads(), time.monotonic, time.time)
        async with (
            open_quotas(config.redis, router_id, seams.clock, num_routers) as quotas,
            open_home(config.redis, REDIS_TIMEOUT_S) as home,
            open_parts(config, membership, router_id, seams, index, quotas, member, home) as parts,
            contextlib.nullcontext() if member is None else member.joined(partial(answer, parts), stop.set),
        ):
            parts.metrics.registry_up.set_function(lambda: membership.connected)
            settings = server_config(config, parts)
            try:
                settings.load()
            except OSError as error:  # ssl's are of these
                files = f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile}"
                files += f" and --ssl-ca-certs {config.ssl_ca_certs}" if config.ssl_ca_certs else ""
                log.error("router cannot start: %s: %s; give a certificate and its key, as PEM", files, error)
                return CANNOT_START
            settle_heap()
            if member is not None and member.start.is_replacement:
                await _warm(parts)
            return await _answer_requests(config, parts, HttpServer(settings), listener, stop, member)
    finally:
        await index.close()
        await membership.close()
        listener.close()


async def _answer_requests(
    config: RouterConfig,
    parts: RouterParts,
    server: HttpServer,
    listener: socket.socket,
    stop: asyncio.Event,
    member: Member | None,
) -> int:
    """Serves until the stop, and drains; returns the exit status."""
    serving = asyncio.create_task(server.serve([listener]), name="http")
    stopped = asyncio.create_task(stop.wait(), name="wait-for-signal")
    if member is not None:
        member.say_serving()
    else:
        scheme = "https" if config.ssl_certfile else "http"
        url = f"{scheme}://{address_of(config.host, listener.getsockname()[1])}"
        log.log(detail_level(), "listening on %s", url)
        report_phase("waiting for workers")
        report_ready(url=url)
    metrics = parts.metrics
    activity = Activity(lambda: sample(metrics.registry), metrics.handoffs_s, own_tokens=int(launched()))
    async with activity_logged(activity.line, logging.DEBUG if config.disable_log_stats else logging.INFO):
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    log.log(detail_level(), "stopping; running requests have %g s", config.shutdown_timeout_s)
    stopped.cancel()
    server.should_exit = True
    await asyncio.wait([serving], timeout=config.shutdown_timeout_s)
    if num_cut := parts.stopping.end():
        log.warning("time is up after %g s: %d requests are cut", config.shutdown_timeout_s, num_cut)
    await serving
    if not stop.is_set():
        log.error("the HTTP server ended by itself")
        return 1
    return 0


def settle_heap() -> None:
    """What is there now stays, and collections need not look at it. Nearly all that a request makes is gone with it:
    with Python's own threshold collections look at it meanwhile."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)


async def _warm(parts: RouterParts) -> None:
    """Wait until this process can serve what its siblings do, so that it refuses nothing that they would not."""
    deadline_s = parts.clock() + _WARM_S
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_WARM_S):
            await parts.models.loaded()
            while True:
                ready, not_ready = readiness(parts.models, parts.workers)
                if (ready and not not_ready) or not await parts.workers.changed(deadline_s):
                    return


def _router_id(config: RouterConfig, port: int, member: Member | None) -> str:
    # Workers tell the requests of several routers apart by it, so it is unique whatever two routers are called.
    name = config.router_id or f"router-{socket.gethostname()}-{port}"
    number = "" if member is None else f".{member.start.number}"
    return f"{name}{number}-{secrets.token_hex(4)}"


def server_config(config: RouterConfig, parts: RouterParts) -> uvicorn.Config:
    """Configures uvicorn. It does not see the proxy's prefix: `Edge` takes it off."""
    return uvicorn.Config(
        make_app(parts),
        http=bounded(HttpLimits(write_timeout_s=config.unread_timeout_s), parts.metrics.count_cut),
        log_config=None,
        # Its coming and going is ours to tell.
        log_level={"info": "warning"}.get(config.log_level, config.log_level),
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=bool(config.forwarded_allow_ips),
        forwarded_allow_ips=config.forwarded_allow_ips,
        ssl_keyfile=config.ssl_keyfile or None,
        ssl_certfile=config.ssl_certfile or None,
        ssl_ca_certs=config.ssl_ca_certs or None,
        ssl_cert_reqs=config.ssl_cert_reqs,
        timeout_graceful_shutdown=int(config.shutdown_timeout_s) + _LAST_WORDS_S,
        timeout_keep_alive=65,
        backlog=2048,
    )
