"""Runs a store node: learns the layout, opens the tiers, serves, announces, flushes on SIGTERM.

The HTTP port (`http.py`) is open all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

import services
from kvstore.block import BlockLayout, HostMemory
from kvstore.errors import KVStoreError
from kvstore.exchange import Outside, PeerIdentity
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import ExchangeTimeouts
from kvstore.registry import Membership, Registrar, WorkerRecord, next_incarnation
from kvstore.store import DiskTier, DiskWrites, StoreNode, StoreTooSmall, TieredStore, check_directory
from kvstore.threads import Threads, end_threads
from kvstore.transport import make_transports
from services.activity import activity_logged
from services.logs import configure_logging, detail_level, report_phase, report_ready, request_scope
from services.node import hindering, in_words, loop_watch, transport_watches, watched
from services.peer_settings import PeerProofs
from services.progress import Watch
from services.settings import SettingsError
from services.startup import CANNOT_START, CannotListen, address_of, check_registry
from services.store.activity import StoreActivity, store_series
from services.store.config import StoreConfig
from services.store.http import StoreHttp
from services.store.index_feed import StoreIndexFeed
from services.store.metrics import StoreMetrics
from services.store.whose import choose_worker

log = logging.getLogger(__name__)

# A worker lends between two steps, which may be long; nobody waits for what a store pulls.
_OFFER_S = 5.0
# A write that waits for the device's cache to empty is slow, and no more.
_SLOW_DISK_S = 10.0


class Stopped(Exception):
    """The signal came before there was anything to serve."""


def run_store(config: StoreConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status, 2 if the node cannot start."""
    configure_logging(config.log_level, config.log_format, fields={"role": "store", "worker_id": config.worker_id})
    try:
        check_registry(config.redis)
        if config.store_disk_dir:  # now, and not when a worker is there
            check_directory(Path(config.store_disk_dir))
        proofs = config.read_peer_proofs()
    except (KVStoreError, SettingsError) as error:
        log.error("store node cannot start: %s", error)
        return CANNOT_START
    return end_threads(uvloop.run(_serve(config, Outside(), proofs)))


async def _serve(config: StoreConfig, outside: Outside, proofs: PeerProofs) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = StoreMetrics()
    http = StoreHttp(config.worker_id, metrics, proofs.tokens, config.open_metrics)
    try:
        await http.start(config.host, config.http_port)
    except OSError as error:
        why = CannotListen(config.host, config.http_port, "--http-port", error.strerror)
        log.error("store node cannot start: %s", why)
        return CANNOT_START
    try:
        await _serve_blocks(config, outside, proofs.blocks, metrics, http, stop)
    except Stopped:
        return 0
    except (KVStoreError, OSError, ValueError) as error:
        log.error("store node cannot start: %s", error)
        return CANNOT_START
    finally:
        await http.close()
    return 0


async def _serve_blocks(
    config: StoreConfig,
    outside: Outside,
    keys: PeerKeys,
    metrics: StoreMetrics,
    http: StoreHttp,
    stop: asyncio.Event,
) -> None:
    http.not_ready = f"waiting for a worker of {', '.join(config.served_model_name) or 'any model'}"
    log.log(detail_level(), "%s; debug http://%s", http.not_ready, http.address)
    worker, layout = await wait_for_layout(config, metrics, stop)
    http.not_ready = "opening memory and disk"
    async with open_store(config, outside, keys, worker, layout, metrics, http) as record:
        fields = {"role": "store", "worker_id": record.worker_id}  # known now, given or made of the port
        configure_logging(config.log_level, config.log_format, fields=fields)
        text = "%s serves blocks on %s, debug http://%s"
        log.log(detail_level(), text, record.worker_id, record.kv_address, record.http_address)
        report_phase("registered")
        report_ready(http=record.http_address)
        http.not_ready = ""
        activity = StoreActivity(lambda: store_series(metrics.registry))
        async with activity_logged(activity.line, logging.DEBUG if config.disable_log_stats else detail_level()):
            await stop.wait()
        http.not_ready = "stopping"
        log.log(detail_level(), "%s stops", record.worker_id)


async def wait_for_layout(
    config: StoreConfig, metrics: StoreMetrics, stop: asyncio.Event
) -> tuple[WorkerRecord, BlockLayout]:
    """Wait for a worker that serves our model, and take over its layout. Raises Stopped, `RegistryError`.

    A layout needs the model's configuration and a fingerprint of its weights: workers have both, and a store that read
    them itself could only come to another conclusion.
    """
    membership = Membership(config.redis, grace_s=config.lease_s)
    metrics.index.watch_registry(lambda: membership.connected)
    chosen: asyncio.Future[tuple[WorkerRecord, BlockLayout]] = asyncio.get_running_loop().create_future()

    def look(records: tuple[WorkerRecord, ...]) -> None:
        found = choose_worker(records, config.served_model_name)
        if found is not None and not chosen.done():
            chosen.set_result(found)

    membership.on_change(look)
    await membership.start()
    stopped = asyncio.ensure_future(stop.wait())
    either: list[asyncio.Future[Any]] = [chosen, stopped]
    try:
        report_phase("waiting for a worker")
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        await membership.close()
    if not chosen.done():
        raise Stopped
    return chosen.result()


@asynccontextmanager
async def open_store(
    config: StoreConfig,
    outside: Outside,
    keys: PeerKeys,
    worker: WorkerRecord,
    layout: BlockLayout,
    metrics: StoreMetrics,
    http: StoreHttp,
) -> AsyncIterator[WorkerRecord]:
    """The node, listening, in the index and announced; closed at the end, from the outside in.

    Raises `StoreTooSmall`, `DirectoryLocked`, `TransportError`, OSError, ValueError.
    """
    async with contextlib.AsyncExitStack() as cleanup:
        name = config.worker_id or f"store-{_host(config)}-{config.kv_port or secrets.token_hex(4)}"
        incarnation = await next_incarnation(config.redis, name)
        feed = StoreIndexFeed(config.redis, name, incarnation, config.lease_s, metrics.index)
        store = await _open_tiers(config, layout, feed, outside.threads)
        cleanup.push_async_callback(store.close, config.drain_timeout_s)
        transports = make_transports(config.kv_transport, store.memory, name, config.host)
        metrics.exchange.watch(transports)
        node = StoreNode(
            PeerIdentity(f"{name}/{incarnation}", "store", incarnation, layout),
            store,
            transports,
            outside=outside,
            keys=keys,
            timeouts=ExchangeTimeouts(peer_timeout_s=config.peer_timeout_s, offer_s=_OFFER_S),
            observer=metrics.exchange,
            request_scope=request_scope,
        )
        cleanup.push_async_callback(node.close, config.drain_timeout_s)
        await node.start(config.host, config.kv_port)
        await cleanup.enter_async_context(_watched(config, node, outside.threads, metrics, http))
        metrics.watch(node)
        http.watch(node, feed)
        feed.watch(store)
        await feed.start()
        cleanup.push_async_callback(feed.close)
        record = _record(config, name, node, worker, http.address, tuple(transport.name for transport in transports))
        registrar = Registrar(config.redis, record, lease_s=config.lease_s)
        metrics.index.watch_registry(lambda: registrar.connected)
        await registrar.start()
        cleanup.push_async_callback(registrar.close)
        log.log(
            detail_level(),
            "%s keeps blocks of %s: %d of %d bytes in memory, %s",
            name,
            ", ".join(worker.served_model_names),
            store.dram.num_slots,
            layout.block_bytes,
            "no disk" if store.disk is None else f"{len(store.disk)} found on disk",
        )
        yield record


@asynccontextmanager
async def _watched(
    config: StoreConfig, node: StoreNode, threads: Threads, metrics: StoreMetrics, http: StoreHttp
) -> AsyncIterator[None]:
    """Have it watched that the node gets on. One whose disk hangs lends what is in memory, and stays as it is."""

    def disk_has_work() -> bool:
        disk.num_advances = node.store.num_disk_jobs_ended
        return node.store.has_disk_jobs

    def on_change(parts: tuple[str, ...]) -> None:
        http.stuck = in_words(hindering(parts, node.exchange))

    disk = Watch("disk", disk_has_work, lambda: _SLOW_DISK_S + config.stuck_after_s, is_curable=lambda: False)
    watches = [
        loop_watch(config.stuck_after_s),
        *transport_watches(node.exchange, config.stuck_after_s),
        *([disk] if node.store.disk is not None else []),
    ]
    async with watched(watches, config.stuck_exit_s, threads, on_change) as dog:
        metrics.progress.watch(dog)
        yield


async def _open_tiers(config: StoreConfig, layout: BlockLayout, feed: StoreIndexFeed, threads: Threads) -> TieredStore:
    num_slots = config.store_dram_bytes // layout.block_bytes
    if num_slots < 1:
        raise StoreTooSmall(
            f"--store-dram-bytes {config.store_dram_bytes} holds no block of {layout.block_bytes} bytes"
        )
    memory = HostMemory.allocate(num_slots, layout.block_bytes)
    # What is to be on disk before it leaves memory is written before anything presses.
    disk_writes = DiskWrites.ALL if config.store_disk_writes == "evicted" else DiskWrites(config.store_disk_writes)
    disk = await threads.run(lambda: _open_disk(config, layout)) if config.store_disk_dir else None
    return TieredStore(memory, disk, disk_writes=disk_writes, on_change=feed.changed, threads=threads)


def _open_disk(config: StoreConfig, layout: BlockLayout) -> DiskTier:
    report_phase("reading the disk")
    return DiskTier.open(Path(config.store_disk_dir), layout, config.store_disk_bytes)


def _record(
    config: StoreConfig,
    name: str,
    node: StoreNode,
    worker: WorkerRecord,
    http_address: str,
    transports: tuple[str, ...],
) -> WorkerRecord:
    """Return the node's record for the registry; of the model it says what the worker says."""
    layout, host = node.identity.layout, _host(config)
    return WorkerRecord(
        worker_id=name,
        role="store",
        incarnation=node.identity.incarnation,
        served_model_names=worker.served_model_names,
        model_path=worker.model_path,
        tokenizer_path=worker.tokenizer_path,
        model_fingerprint=layout.model_fingerprint,
        grpc_address="",
        kv_address=address_of(host, node.exchange.address.rsplit(":", 1)[1]),
        http_address=address_of(host, http_address.rsplit(":", 1)[1]),
        block_size=layout.block_size,
        num_blocks=node.store.dram.num_slots,
        max_model_len=0,
        max_num_seqs=0,
        dtype=worker.dtype,
        transports=transports,
        version=services.__version__,
        started_unix_s=time.time(),
        layout=layout.to_wire(),
    )


def _host(config: StoreConfig) -> str:
    """Under which workers reach us."""
    return config.advertise_host or config.host
