"""Asks a Redis server once, at a start: it is there, it is away, or it will never have us."""

from __future__ import annotations

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.retry import Retry

from kvstore.errors import RegistryError
from kvstore.registry.redis_session import describe_url

_TIMEOUT_S = 3.0


class RegistryAway(RegistryError):
    """Nobody answers at the URL, or not in time. Later somebody may."""


def redis_version(url: str, timeout_s: float = _TIMEOUT_S) -> str:
    """Return the version of the server at `url`. Blocks.

    Raises `RegistryAway`, or `RegistryError` where the URL is malformed or the server refuses us. Messages name the
    server without its password.
    """
    where = describe_url(url)
    try:
        client = redis.Redis.from_url(
            url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        try:
            info = client.info("server")
        finally:
            client.close()
    except (AuthenticationError, NoPermissionError) as error:
        raise RegistryError(f"Redis at {where} refuses us: {error}; correct user and password in --redis") from error
    except ResponseError as error:
        raise RegistryError(f"what answers at {where} is no Redis that we can use: {error}; correct --redis") from error
    except ValueError as error:
        raise RegistryError(f"{where} is no URL of a Redis: {error}; correct --redis") from error
    except (redis.RedisError, OSError) as error:
        raise RegistryAway(f"Redis at {where} does not answer: {error}; start it, or correct --redis") from error
    return str(info["redis_version"])
