"""Calls the index's scripts and sweeps up the dead, for its writers and readers."""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from typing import cast

import redis.asyncio
from redis.exceptions import NoScriptError

from kvstore.index.scripts import SWEEP, IndexKeys, Script
from kvstore.registry import RedisSession, raise_if_cancelled

# How much one sweeping script does, so that it takes Redis well under a millisecond.
_SWEEP_BUCKETS = 64
_SWEEP_BLOCKS = 1024
_SWEEPER_MS = 1000
# A backlog leaves Redis to others for so many times as long as our last call took: a hundred processes that announce
# everything at once (Redis was flushed) then keep each other, and lookups, waiting for little.
_PACE = 4
_MAX_PACE_S = 0.05


class LookupOutcome(enum.Enum):
    """The ways a lookup ends. All but ANSWERED give no holdings."""

    ANSWERED = "answered"
    TIMED_OUT = "timed out"  # no reply within the caller's deadline
    FAILED = "failed"  # the connection broke, or Redis refused
    SKIPPED = "skipped"  # Redis is known to be away or silent, or too many lookups wait: not even tried


class ResyncReason(enum.Enum):
    """The reasons why a writer announces everything."""

    START = "start"
    LOST = "lost"  # Redis was flushed, restarted or rolled back, or took us for dead
    OVERFLOW = "overflow"  # more changes than we may keep waited to be written
    ERROR = "error"  # Redis refused a script, or the snapshot failed


class IndexObserver:
    """Hears of everything and does nothing; override what you count. Called in the event loop; return at once."""

    def lookup_ended(self, outcome: LookupOutcome, num_blocks: int, num_held: int, duration_s: float) -> None:
        """A lookup for `num_blocks` has ended; the longest prefix found has `num_held`."""

    def batch_written(self, num_blocks: int, duration_s: float) -> None:
        """Redis took a batch."""

    def resync_started(self, reason: ResyncReason) -> None:
        """A writer begins to announce everything."""

    def resync_ended(self, reason: ResyncReason, num_blocks: int, duration_s: float) -> None:
        """Everything is announced."""


class IndexSession(RedisSession):
    """One session with the index."""

    def __init__(self, redis_url: str, name: str, prefix: str, sweep_s: float, timeout_s: float) -> None:
        super().__init__(redis_url, name, timeout_s, max_backoff_s=min(1.0, sweep_s))
        self._keys = IndexKeys.under(prefix)
        self._sweep_s = sweep_s
        self._next_sweep_s = time.monotonic()
        self._token = secrets.token_hex(8)

    async def _call(self, client: redis.asyncio.Redis, script: Script, *arguments: str | bytes | int) -> object:
        """Run a script by its digest, or by its text if Redis does not have it yet. Raises one of REDIS_FAILURES."""
        rest = (1, self._keys.index, self._keys.base, *arguments)
        async with asyncio.timeout(self._timeout_s):
            try:
                reply: object = await client.execute_command("EVALSHA", script.sha, *rest)  # type: ignore[no-untyped-call]
            except NoScriptError:
                reply = await client.execute_command("EVAL", script.text, *rest)  # type: ignore[no-untyped-call]
        raise_if_cancelled()
        return reply

    async def _sweep_if_due(self, client: redis.asyncio.Redis) -> None:
        """Take some entries of dead holders out of Redis, if it is time to."""
        if time.monotonic() < self._next_sweep_s:
            return
        start_s = time.monotonic()
        num_dead = cast("int", await self._call(client, SWEEP, self._token, _SWEEPER_MS, _SWEEP_BUCKETS, _SWEEP_BLOCKS))
        now_s = time.monotonic()
        self._next_sweep_s = now_s + (pace_s(now_s - start_s) if num_dead > 0 else self._sweep_s)


def pace_s(call_s: float) -> float:
    """Return how long to leave Redis to others after a call of so many seconds, while a backlog waits."""
    return min(_MAX_PACE_S, _PACE * call_s)
