"""Asks the prefix index in Redis, as hints, who holds a prompt's blocks.

Routers and workers learn in one round trip who has how long a prefix of it. The owner validates what it is asked for:
a wrong or missing entry costs a recomputation, never a token. Redis away, slow or empty means: nobody has anything.
`scripts` says what stands in Redis and why.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import redis.asyncio
from redis.exceptions import MovedError, NoScriptError, ResponseError

from kvstore.block import BlockHash
from kvstore.errors import RegistryError
from kvstore.index.entries import Holding, decode_holders, decode_holdings, encode_keys
from kvstore.index.scripts import LOOKUP
from kvstore.index.session import IndexObserver, IndexSession, LookupOutcome
from kvstore.registry import ConnectionState, describe, raise_if_cancelled

logger = logging.getLogger(__name__)

# Redis serves nobody else during a script: 8,192 blocks take it a few milliseconds, and are 262,144 tokens.
MAX_LOOKUP_BLOCKS = 8192
_MAX_WAITING = 1024
_MAX_LOOKUPS_PER_CALL = 16

Runs = list[tuple[int, bytes]]
Holders = dict[int, tuple[str, str]]


@dataclass(frozen=True)
class _Lookup:
    """A lookup that waits for Redis; its reply is None if Redis failed."""

    keys: bytes
    reply: asyncio.Future[tuple[Runs, Holders] | None]


class IndexReader(IndexSession):
    """Asks the index. One connection carries all lookups: those that come during a round trip share the next one.

    That connection is also the circuit breaker. A lookup is tried only while Redis answers; the first that gets no
    reply in time stops those after it, until the connection has answered something again.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        prefix: str = "tandem",
        probe_s: float = 1.0,
        timeout_s: float = 1.0,
        observer: IndexObserver | None = None,
    ) -> None:
        """`probe_s`: how often an idle connection is tried. Raises RegistryError."""
        if probe_s <= 0:
            raise RegistryError(f"the prefix index's probe interval must be positive, not {probe_s} s")
        super().__init__(redis_url, "prefix index", prefix, probe_s, timeout_s)
        self._observer = observer or IndexObserver()
        self._waiting: collections.deque[_Lookup] = collections.deque()
        self._has_waiting = asyncio.Event()
        self._is_silent = False
        self._version = b""
        self._holders: Holders = {}

    @property
    def available(self) -> bool:
        """Whether a lookup would be tried now."""
        return self.connected and not self._is_silent

    async def lookup(self, hashes: Sequence[BlockHash], timeout_s: float = 0.05) -> list[Holding]:
        """Return who holds how long a prefix of `hashes`, the longest first; [] if Redis does not say so in time.

        A prefix is counted from `hashes[0]`, so what comes after one holder's prefix is found by asking for the rest.
        Of more than `MAX_LOOKUP_BLOCKS` hashes the first so many are looked up.
        """
        if not hashes:
            return []
        start_s = time.monotonic()
        hashes = hashes[:MAX_LOOKUP_BLOCKS]
        outcome, holdings = LookupOutcome.SKIPPED, list[Holding]()
        if self.available and len(self._waiting) < _MAX_WAITING:
            lookup = _Lookup(encode_keys(hashes), asyncio.get_running_loop().create_future())
            self._waiting.append(lookup)
            self._has_waiting.set()
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await lookup.reply
            except TimeoutError:
                outcome = LookupOutcome.TIMED_OUT
                self._is_silent = True
            else:
                outcome = LookupOutcome.FAILED if reply is None else LookupOutcome.ANSWERED
                holdings = decode_holdings(*reply) if reply is not None else []
        num_held = holdings[0].num_blocks if holdings else 0
        self._observer.lookup_ended(outcome, len(hashes), num_held, time.monotonic() - start_s)
        return holdings

    async def close(self) -> None:
        """Stop. Lookups that wait get []."""
        await super().close()
        self._fail_waiting()

    async def _session(self, client: redis.asyncio.Redis) -> None:
        self._next_sweep_s = time.monotonic()  # the first call, which says whether Redis is there
        try:
            while True:
                await self._probe_if_due(client)
                await self._wait_for_lookups()
                if self._waiting:
                    await self._answer(client)
        finally:
            self._is_silent = True
            self._fail_waiting()

    async def _probe_if_due(self, client: redis.asyncio.Redis) -> None:
        """Sweep, now and then: that also shows whether an idle connection is alive."""
        try:
            await self._sweep_if_due(client)
        except MovedError:
            raise
        except ResponseError as error:  # the next writer repairs what is there; lookups do without
            logger.warning("%s: sweeping failed: %s", self._name, describe(error))
            self._next_sweep_s = time.monotonic() + self._sweep_s
        self._heard_from_redis()

    async def _wait_for_lookups(self) -> None:
        """Return when a lookup waits, or when the next probe is due."""
        if self._waiting:
            return
        self._has_waiting.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._next_sweep_s - time.monotonic())):
                await self._has_waiting.wait()

    async def _answer(self, client: redis.asyncio.Redis) -> None:
        """Send what waits as one pipeline and resolve it. What has been given up meanwhile is not sent."""
        num_taken = min(len(self._waiting), _MAX_LOOKUPS_PER_CALL)
        taken = [self._waiting.popleft() for _ in range(num_taken)]
        lookups = [lookup for lookup in taken if not lookup.reply.done()]
        try:
            if lookups:
                for lookup, reply in zip(lookups, await self._look_up(client, lookups), strict=True):
                    found = self._decode(reply)
                    if not lookup.reply.done():
                        lookup.reply.set_result(found)
            else:
                self._next_sweep_s = time.monotonic()  # hear from Redis all the same, or we stay silent
        finally:
            for lookup in lookups:
                if not lookup.reply.done():
                    lookup.reply.set_result(None)

    async def _look_up(self, client: redis.asyncio.Redis, lookups: Sequence[_Lookup]) -> list[list[object]]:
        """Return the replies to the lookups. Raises one of REDIS_FAILURES."""
        async with asyncio.timeout(self._timeout_s):
            replies = await self._execute(client, lookups)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                await client.script_load(LOOKUP.text)
                replies = await self._execute(client, lookups)
        raise_if_cancelled()
        self._heard_from_redis()
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return cast("list[list[object]]", replies)

    async def _execute(self, client: redis.asyncio.Redis, lookups: Sequence[_Lookup]) -> list[object]:
        pipeline = client.pipeline(transaction=False)
        for lookup in lookups:
            names = (self._keys.index, self._keys.base)
            pipeline.execute_command("EVALSHA", LOOKUP.sha, 1, *names, lookup.keys, self._version)
        replies: list[object] = await pipeline.execute(raise_on_error=False)
        return replies

    def _decode(self, reply: list[object]) -> tuple[Runs, Holders]:
        """Split a reply of `LOOKUP` into runs and holders; a new table of these is kept."""
        version, table = cast("tuple[bytes, list[bytes] | None]", reply[:2])
        if table is not None:
            self._version = version
            self._holders = decode_holders(table)
        runs = list(zip(cast("list[int]", reply[2::2]), cast("list[bytes]", reply[3::2]), strict=True))
        return runs, self._holders

    def _heard_from_redis(self) -> None:
        self._is_silent = False
        self._set_state(ConnectionState.CONNECTED)

    def _fail_waiting(self) -> None:
        for lookup in self._waiting:
            if not lookup.reply.done():
                lookup.reply.set_result(None)
        self._waiting.clear()
