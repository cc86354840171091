"""Assembles the parts of a worker. Nothing here listens or runs yet: see `process.open_worker`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvstore.exchange import BlockExchange, Outside, PeerIdentity
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import ExchangeTimeouts
from kvstore.registry import Membership
from kvstore.threads import Threads
from kvstore.transport import make_transports
from services.engine.api import Engine
from services.logs import request_scope
from services.orders import Orders
from services.rates import RateLearner
from services.startup import address_of
from services.worker.config import WorkerConfig
from services.worker.engine_thread import EngineThread
from services.worker.index_feed import WorkerIndexFeed
from services.worker.metrics import WorkerMetrics
from services.worker.prefixes import CacheLender, FetchCosts, HostPrefixes, PrefixFetcher
from services.worker.store import StoreFeed

Role: TypeAlias = Literal["prefill", "decode", "elastic"]

# A step that takes so many times what it was expected to is slow, and no more; what was never done is a guess.
_HONEST_SLOWNESS = 10.0


@dataclass(frozen=True)
class Seams:
    """The ways in which a worker reaches its outside; `main()` chooses, the tests choose otherwise."""

    orders: Orders
    outside: Outside
    clock: Callable[[], float]  # Unix time, of requests' timelines
    block_keys: PeerKeys = field(default_factory=PeerKeys)  # by which block-protocol peers know each other


@dataclass(frozen=True)
class WorkerParts:
    """The parts of a worker, which the process owns and closes; a service knows all but the feeds."""

    worker_id: str
    incarnation: str
    host: str  # where others reach us
    engine: Engine
    thread: EngineThread
    exchange: BlockExchange
    orders: Orders
    threads: Threads
    clock: Callable[[], float]
    host_prefixes: HostPrefixes
    fetcher: PrefixFetcher
    rates: RateLearner
    metrics: WorkerMetrics
    index_feed: WorkerIndexFeed
    store_feed: StoreFeed | None

    @property
    def kv_address(self) -> str:
        """Where others reach the exchange, once it listens."""
        return address_of(self.host, self.exchange.address.rsplit(":", 1)[1])


def assemble(
    config: WorkerConfig, role: Role, engine: Engine, worker_id: str, incarnation: str, seams: Seams
) -> WorkerParts:
    """Build them. What the engine's cache gains and loses is told to the index and, if there is one, the store feed.

    Raises TransportError.
    """
    metrics, rates, threads = WorkerMetrics(engine, served_names(config)[0], role), engine.rates, seams.outside.threads

    def allowed_s() -> float:
        """How long the engine's thread may take over what it does; `warm_up` has told the machine's speed."""
        return max(config.stuck_after_s, _HONEST_SLOWNESS * rates.rates.step_s(engine.step_shape))

    thread = EngineThread(engine, threads, metrics.steps.ended, allowed_s)
    host_prefixes = HostPrefixes(engine, thread, threads, config.prefix_fetch_timeout_s)
    identity = PeerIdentity(f"{worker_id}/{incarnation}", role, incarnation, engine.layout)
    lender = CacheLender(engine, thread, host_prefixes)
    exchange = _exchange(config, identity, worker_id, engine, lender, metrics, seams)
    costs = FetchCosts(rates, engine.layout.block_bytes // engine.layout.block_size, config.prefix_fetch)
    index_feed = WorkerIndexFeed(config.redis, worker_id, incarnation, config.lease_s, engine, metrics.index)
    thread.cache_followers.append(index_feed.changed)
    thread.host_followers.append(index_feed.host_changed)
    store_feed = _store_feed(config, engine, exchange, metrics)
    if store_feed is not None:
        thread.cache_followers.append(store_feed.changed)
    return WorkerParts(
        worker_id=worker_id,
        incarnation=incarnation,
        host=config.advertise_host or config.host,
        engine=engine,
        thread=thread,
        exchange=exchange,
        orders=seams.orders,
        threads=threads,
        clock=seams.clock,
        host_prefixes=host_prefixes,
        fetcher=PrefixFetcher(
            worker_id,
            engine,
            thread,
            exchange,
            host_prefixes,
            costs,
            config.prefix_fetch_timeout_s,
            metrics.prefix_fetched,
        ),
        rates=rates,
        metrics=metrics,
        index_feed=index_feed,
        store_feed=store_feed,
    )


def _exchange(
    config: WorkerConfig,
    identity: PeerIdentity,
    worker_id: str,
    engine: Engine,
    lender: CacheLender,
    metrics: WorkerMetrics,
    seams: Seams,
) -> BlockExchange:
    transports = make_transports(config.kv_transport, engine.memory, worker_id, config.host)
    metrics.exchange.watch(transports)
    return BlockExchange(
        identity,
        engine.memory,
        transports,
        exchange_timeouts(config),
        proof_key=engine.proof_key,
        keys=seams.block_keys,
        outside=seams.outside,
        observer=metrics.exchange,
        lender=lender,
        request_scope=request_scope,
    )


def served_names(config: WorkerConfig) -> tuple[str, ...]:
    """Under which clients ask for the model; the first is the one in metrics."""
    return config.served_model_name or (config.model,)


def exchange_timeouts(config: WorkerConfig) -> ExchangeTimeouts:
    """The exchange's deadlines: those that a setting names, else its own defaults."""
    handoff_timeout_s = getattr(config, "handoff_timeout_s", None)
    named = {
        "peer_timeout_s": config.peer_timeout_s,
        "offer_s": getattr(config, "prefill_queue_timeout_s", None),
        **dict.fromkeys(("announce_s", "read_s", "confirm_s"), handoff_timeout_s),
        "reserve_s": getattr(config, "reserve_timeout_s", handoff_timeout_s),
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
