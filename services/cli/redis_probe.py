"""Asks a Redis server for its version, for `tandem up` and `tandem doctor`."""

from __future__ import annotations

from urllib.parse import urlsplit

import redis

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
