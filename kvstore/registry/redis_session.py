"""Keeps a session with Redis that outlives Redis, for registry and prefix index.

A `RedisSession` owns one task, reconnects with backoff for as long as it is not closed, and bounds every call in time.
In a Redis Cluster it talks to the node that has our keys: they are in one slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import cast
from urllib.parse import urlsplit, urlunsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MovedError, RedisError

from kvstore.errors import RegistryError

logger = logging.getLogger(__name__)

# All that a call to a Redis that is away, hung or misconfigured can raise; asyncio's TimeoutError is an OSError.
REDIS_FAILURES = (RedisError, OSError)

_FIRST_BACKOFF_S = 0.05


class ConnectionState(enum.Enum):
    """The states of a connection with Redis."""

    CONNECTING = "connecting"  # not yet reached, not yet failed
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"  # failing; trying again
    CLOSED = "closed"


class RedisSession:
    """Keeps one session with Redis going until closed: reconnects with backoff, says so once, never gives up.

    What is not Redis's failure, a cancellation that nobody ordered included, is a bug: it is logged whole, and costs
    one session. A subclass says in `_session` what to do while connected. Event loop only.
    """

    def __init__(self, redis_url: str, name: str, timeout_s: float, max_backoff_s: float) -> None:
        try:
            redis.asyncio.ConnectionPool.from_url(redis_url)
        except ValueError as error:
            raise RegistryError(f"malformed Redis URL {describe_url(redis_url)}: {error}") from error
        if timeout_s <= 0 or max_backoff_s <= 0:
            raise RegistryError(f"{name}: timeout ({timeout_s} s) and backoff ({max_backoff_s} s) must be positive")
        self._redis_url = redis_url
        self._name = name
        self._timeout_s = timeout_s
        self._max_backoff_s = max_backoff_s
        self.connection_state = ConnectionState.CONNECTING
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the last call to Redis succeeded."""
        return self.connection_state is ConnectionState.CONNECTED

    async def start(self) -> None:
        """Start the task and return at once; Redis need not be there. Call once."""
        if self._task is not None:
            raise RegistryError(f"{self._name} was started twice")
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Stop the task. Returns within the timeout of a few calls, whether Redis is there or not."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._set_state(ConnectionState.CLOSED)

    async def _session(self, client: redis.asyncio.Redis) -> None:
        """Talk to Redis until it fails; return only by raising."""
        raise NotImplementedError

    async def _run(self) -> None:
        num_failures = 0
        while True:
            try:
                async with open_client(self._redis_url, self._timeout_s) as client:
                    await self._at_home(client, self._session)
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                    raise
                if self.connected:
                    num_failures = 0
                if num_failures == 0:
                    where = describe_url(self._redis_url)
                    is_ours = not isinstance(error, REDIS_FAILURES)
                    text = "%s: Redis at %s failed, trying again: %s"
                    logger.warning(text, self._name, where, describe(error), exc_info=error if is_ours else None)
                num_failures += 1
                self._set_state(ConnectionState.DISCONNECTED)
            await asyncio.sleep(min(self._max_backoff_s, _FIRST_BACKOFF_S * 2 ** min(num_failures - 1, 20)))

    async def _at_home(
        self, client: redis.asyncio.Redis, work: Callable[[redis.asyncio.Redis], Awaitable[object]]
    ) -> None:
        """Do `work` with `client`, or with the node of a Redis Cluster that it is referred to.

        All keys are in one slot, so one redirection finds them all; there is no map of the cluster to keep.
        """
        try:
            await work(client)
        except MovedError as moved:
            url = redirect(self._redis_url, moved.host, moved.port)
            async with open_client(url, self._timeout_s) as home:
                await work(home)

    def _set_state(self, state: ConnectionState) -> None:
        if state is not self.connection_state:
            if state is ConnectionState.CONNECTED:
                logger.debug("%s: connected to Redis at %s", self._name, describe_url(self._redis_url))
            self.connection_state = state


@contextlib.asynccontextmanager
async def open_client(redis_url: str, timeout_s: float) -> AsyncIterator[redis.asyncio.Redis]:
    """A client that connects at its first command and never retries by itself: the session has its own backoff."""
    client = redis.asyncio.Redis.from_url(
        redis_url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    try:
        yield client
    finally:
        with contextlib.suppress(*REDIS_FAILURES):  # what is broken may fail to close; it is gone anyway
            await client.aclose()


class Home:
    """The node that has our keys: of a Redis Cluster the one that we are referred to, else the Redis at the URL.

    A redirection is remembered until the node fails; then whoever is at the URL is asked again. See `open_home`.
    """

    def __init__(self, redis_url: str, timeout_s: float, clients: contextlib.AsyncExitStack) -> None:
        self._first_url = self._url = redis_url
        self._timeout_s = timeout_s
        self._stack = clients
        self._clients: dict[str, redis.asyncio.Redis] = {}  # as many as the cluster has had homes for our keys

    async def eval(self, script: str, num_keys: int, *keys_and_arguments: str) -> object:
        """Run a script whose keys have our hash tag. Raises one of `REDIS_FAILURES`."""
        try:
            try:
                return await self._eval(script, num_keys, *keys_and_arguments)
            except MovedError as moved:
                self._url = redirect(self._first_url, moved.host, moved.port)
                return await self._eval(script, num_keys, *keys_and_arguments)
        except (*REDIS_FAILURES, asyncio.CancelledError):
            self._url = self._first_url
            raise

    async def _eval(self, script: str, num_keys: int, *keys_and_arguments: str) -> object:
        client = self._clients.get(self._url)
        if client is None:
            client = await self._stack.enter_async_context(open_client(self._url, self._timeout_s))
            self._clients[self._url] = client
        return await cast("Awaitable[object]", client.eval(script, num_keys, *keys_and_arguments))


@contextlib.asynccontextmanager
async def open_home(redis_url: str, timeout_s: float) -> AsyncIterator[Home]:
    """Open the node that has our keys; it connects at its first script, and never retries by itself."""
    async with contextlib.AsyncExitStack() as clients:
        yield Home(redis_url, timeout_s, clients)


async def run_script(
    client: redis.asyncio.Redis,
    script: str,
    keys: Sequence[str],
    arguments: Sequence[str | bytes | int],
    timeout_s: float,
) -> object:
    """Run a Lua script atomically and return its reply. Raises one of `REDIS_FAILURES`."""
    async with asyncio.timeout(timeout_s):  # the socket's timeouts leave out the name lookup
        # redis-py types arguments as str and takes bytes and integers as well.
        reply = client.eval(script, len(keys), *keys, *cast("Sequence[str]", arguments))
        result = await cast("Awaitable[object]", reply)
    raise_if_cancelled()
    return result


def raise_if_cancelled() -> None:
    """Raise the CancelledError that redis-py swallows now and then: it sends under asyncio.wait_for, which (before
    Python 3.12) loses one that arrives just as it is done. A session lives on such calls alone and would never end; the
    task still knows that it was cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def describe_url(redis_url: str) -> str:
    """Return the URL without user and password, fit for a log."""
    try:
        parts = urlsplit(redis_url)
    except ValueError:
        return "(not a URL)"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def redirect(redis_url: str, host: str, port: int) -> str:
    """Return the URL with another host and port; an empty host means the same one (Redis 7 may not know its name)."""
    parts = urlsplit(redis_url)
    login, at, _ = parts.netloc.rpartition("@")
    host = host or parts.hostname or ""
    return urlunsplit(parts._replace(netloc=f"{login}{at}{f'[{host}]' if ':' in host else host}:{port}"))


def describe(error: BaseException) -> str:
    """Return kind and text of an error; some of redis-py's have no text, and a timeout has none."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
