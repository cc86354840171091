"""Assembles the parts of a worker. Nothing here listens or runs yet: see `process.open_worker`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvstore.exchange import BlockExchange, Outside, PeerIdentity
from kvstore.pool import CacheChange
from kvstore.protocol import ExchangeTimeouts
from kvstore.registry import Membership
from kvstore.threads import Threads
from kvstore.transport import make_transports
from services.engine.api import Engine, StepOutput
from services.logs import request_scope
from services.orders import Orders
from services.rates import RateLearner
from services.worker.config import WorkerConfig
from services.worker.engine_thread import EngineThread
from services.worker.fetch_costs import FetchCosts
from services.worker.host_prefixes import HostPrefixes
from services.worker.index_feed import IndexFeed
from services.worker.lender import CacheLender
from services.worker.metrics import WorkerMetrics
from services.worker.prefix_fetcher import PrefixFetcher
from services.worker.store import StoreFeed

Role: TypeAlias = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Seams:
    """The ways in which a worker reaches its outside; `main()` chooses, the tests choose otherwise."""

    orders: Orders
    outside: Outside


@dataclass(frozen=True)
class WorkerParts:
    """The parts that a service is built from; the process owns and closes all of them."""

    worker_id: str
    incarnation: str
    engine: Engine
    thread: EngineThread
    exchange: BlockExchange
    orders: Orders
    threads: Threads
    host_prefixes: HostPrefixes
    fetcher: PrefixFetcher
    rates: RateLearner
    metrics: WorkerMetrics


@dataclass(frozen=True)
class Assembly:
    """All parts, those included that no service needs to know."""

    parts: WorkerParts
    index_feed: IndexFeed
    store_feed: StoreFeed | None
    transports: tuple[str, ...]


def assemble(
    config: WorkerConfig, role: Role, engine: Engine, worker_id: str, incarnation: str, seams: Seams
) -> Assembly:
    """Build them. What the engine's cache gains and loses is told to the index and, if there is one, the store feed.

    Raises TransportError.
    """
    metrics = WorkerMetrics(engine, served_names(config)[0], role)
    transports = make_transports(config.kv_transport, engine.memory, worker_id)
    metrics.exchange.watch(transports)
    index_feed = IndexFeed(config.redis, worker_id, incarnation, config.lease_s, engine, metrics.index)
    followers = [index_feed.changed]
    rates = RateLearner()

    def step_ended(output: StepOutput) -> None:
        metrics.steps.ended(output)
        rates.step_ended(output.shape, output.duration_s)

    threads = seams.outside.threads
    thread = EngineThread(
        engine,
        threads,
        lambda changes: _tell_all(followers, changes),
        index_feed.host_changed,
        step_ended,
    )
    host_prefixes = HostPrefixes(engine, thread, threads, config.prefix_fetch_timeout_s)
    exchange = BlockExchange(
        PeerIdentity(f"{worker_id}/{incarnation}", role, incarnation, engine.layout),
        engine.memory,
        transports,
        exchange_timeouts(config),
        outside=seams.outside,
        observer=metrics.exchange,
        lender=CacheLender(engine, thread, host_prefixes),
        request_scope=request_scope,
    )
    store_feed = _store_feed(config, engine, exchange, metrics)
    if store_feed is not None:
        followers.append(store_feed.changed)
    fetcher = PrefixFetcher(
        worker_id,
        engine,
        thread,
        exchange,
        host_prefixes,
        FetchCosts(rates, engine.layout.block_bytes // engine.layout.block_size, config.prefix_fetch),
        config.prefix_fetch_timeout_s,
        metrics.prefix_fetched,
    )
    parts = WorkerParts(
        worker_id,
        incarnation,
        engine,
        thread,
        exchange,
        seams.orders,
        threads,
        host_prefixes,
        fetcher,
        rates,
        metrics,
    )
    return Assembly(parts, index_feed, store_feed, tuple(transport.name for transport in transports))


def served_names(config: WorkerConfig) -> tuple[str, ...]:
    """Under which clients ask for the model; the first is the one in metrics."""
    return config.served_model_name or (config.model,)


def exchange_timeouts(config: WorkerConfig) -> ExchangeTimeouts:
    """The exchange's deadlines: those that a setting names, else its own defaults."""
    named = {
        "peer_timeout_s": config.peer_timeout_s,
        "offer_s": getattr(config, "prefill_queue_timeout_s", None),
        "reserve_s": getattr(config, "handoff_timeout_s", None),
        "announce_s": getattr(config, "handoff_timeout_s", None),
        "read_s": getattr(config, "handoff_timeout_s", None),
        "confirm_s": getattr(config, "handoff_timeout_s", None),
        "lease_max_s": getattr(config, "lease_max_s", None),
        "lease_ttl_s": getattr(config, "lease_ttl_s", None),
    }
    return ExchangeTimeouts(**{name: value for name, value in named.items() if value is not None})


def _store_feed(
    config: WorkerConfig, engine: Engine, exchange: BlockExchange, metrics: WorkerMetrics
) -> StoreFeed | None:
    if config.store_write_through == "none" or not config.enable_prefix_caching:
        return None
    return StoreFeed(
        Membership(config.redis, grace_s=config.lease_s),
        exchange,
        engine.capabilities.num_blocks,
        only_reused=config.store_write_through == "reused",
        count=metrics.store_offered,
    )


def _tell_all(followers: Sequence[Callable[[list[CacheChange]], None]], changes: list[CacheChange]) -> None:
    for follower in followers:
        follower(changes)
