"""Knows who is alive: workers and store nodes announce themselves in Redis under a lease, routers follow.

Also the session with Redis that the prefix index uses."""

from kvstore.registry.probe import RegistryAway, redis_version
from kvstore.registry.redis_session import (
    REDIS_FAILURES,
    ConnectionState,
    Home,
    RedisSession,
    describe,
    describe_url,
    open_client,
    open_home,
    raise_if_cancelled,
)
from kvstore.registry.registry import Membership, Registrar
from kvstore.registry.succession import next_incarnation
from kvstore.registry.worker_record import WorkerRecord, new_incarnation

__all__ = [
    "REDIS_FAILURES",
    "ConnectionState",
    "Home",
    "Membership",
    "RedisSession",
    "Registrar",
    "RegistryAway",
    "WorkerRecord",
    "describe",
    "describe_url",
    "new_incarnation",
    "next_incarnation",
    "open_client",
    "open_home",
    "raise_if_cancelled",
    "redis_version",
]
