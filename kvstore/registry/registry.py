"""Keeps the registry in Redis: workers announce themselves under a lease, routers follow.

    {tandem}:workers    hash        worker id -> record (JSON)
    {tandem}:leases     sorted set  worker id, scored by the end of its lease (ms, Redis's clock: workers' clocks never
                                    matter)
    {tandem}:departed   set         worker ids that left or whose lease has ended, until the prefix index has seen it
    {tandem}:changes    channel     "announced ID INCARNATION", "withdrawn ID INCARNATION"

Each access is one atomic Lua script; the braces put all keys into one slot of a Redis Cluster. All is soft state. Redis
away: workers go on serving and keep trying, routers keep the last known membership. Redis back, empty or not: every
worker is there again within a third of a lease. Needs Redis 6.2 or Valkey.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import redis.asyncio
from redis.asyncio.client import PubSub

from kvstore.errors import InvalidRecord, RegistryError
from kvstore.registry.redis_session import (
    REDIS_FAILURES,
    ConnectionState,
    RedisSession,
    describe,
    open_client,
    run_script,
)
from kvstore.registry.roster import Roster, Sighting
from kvstore.registry.worker_record import WorkerRecord, decode_record, encode_record

logger = logging.getLogger(__name__)

DEFAULT_PREFIX = "tandem"
DEFAULT_LEASE_S = 5.0
DEFAULT_TIMEOUT_S = 1.0
MIN_LEASE_S = 0.05

_MAX_DRAINED_MESSAGES = 256

# KEYS: workers, leases, departed. What is not of its type is not ours, and would keep all workers out, or dead ones in.
_REPAIR = """
for i, expected in ipairs({'hash', 'zset', 'set'}) do
  local found = redis.call('TYPE', KEYS[i]).ok
  if found ~= expected and found ~= 'none' then redis.call('DEL', KEYS[i]) end
end
"""

# KEYS: workers, leases, departed. ARGV: id, incarnation, record, lease in ms, channel, "1" from one that starts.
# Returns the newer incarnation that holds the id, or "" once announced. What has expired is pruned first, so that a
# dead twin never bars the living. Who only starts takes no id from one that serves: it may never get so far.
_ANNOUNCE = (
    _REPAIR
    + """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local expired = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)
for _, id in ipairs(expired) do
  redis.call('HDEL', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
  redis.call('SADD', KEYS[3], id)
  redis.call('EXPIRE', KEYS[3], 86400)
end
local old = redis.call('HGET', KEYS[1], ARGV[1])
if old and redis.call('ZSCORE', KEYS[2], ARGV[1]) then
  local ok, record = pcall(cjson.decode, old)
  if ok and type(record) == 'table' and type(record.incarnation) == 'string' and record.incarnation > ARGV[2] then
    return record.incarnation
  end
  if ARGV[6] == '1' and ok and type(record) == 'table' and record.incarnation ~= ARGV[2] and (record.phase or '') == ''
  then return '' end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[1])
for i = 1, 2 do
  local key = KEYS[i]
  if redis.call('PTTL', key) < tonumber(ARGV[4]) then redis.call('PEXPIRE', key, ARGV[4]) end
end
if old ~= ARGV[3] then redis.call('PUBLISH', ARGV[5], 'announced ' .. ARGV[1] .. ' ' .. ARGV[2]) end
return ''
"""
)

# KEYS: workers, leases, departed. ARGV: id, incarnation, channel. Removes the worker unless another incarnation holds
# the id.
_WITHDRAW = (
    _REPAIR
    + """
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not old then return 0 end
local ok, record = pcall(cjson.decode, old)
if not ok or type(record) ~= 'table' or record.incarnation ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('EXPIRE', KEYS[3], 86400)
redis.call('PUBLISH', ARGV[3], 'withdrawn ' .. ARGV[1] .. ' ' .. ARGV[2])
return 1
"""
)

# KEYS: workers, leases. Returns id, remaining ms and record of every live worker, in one flat list. Writes nothing.
_READ = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local alive = redis.call('ZRANGEBYSCORE', KEYS[2], string.format('(%.0f', now), '+inf', 'WITHSCORES')
local found = {}
for i = 1, #alive, 2 do
  found[#found + 1] = alive[i]
  found[#found + 1] = math.ceil(math.min(alive[i + 1] - now, 2147483647))
  found[#found + 1] = redis.call('HGET', KEYS[1], alive[i])
end
return found
"""


@dataclass(frozen=True)
class Keyspace:
    """The names of the registry's keys and channel."""

    keys: tuple[str, str, str]
    channel: str

    @classmethod
    def under(cls, prefix: str) -> Keyspace:
        """Return the names under a prefix; deployments that share a Redis take different ones."""
        if not prefix or "{" in prefix or "}" in prefix:
            raise RegistryError(f"a registry prefix must be non-empty and without braces, not {prefix!r}")
        base = f"{{{prefix}}}"
        return cls((f"{base}:workers", f"{base}:leases", f"{base}:departed"), f"{base}:changes")


class Registrar(RedisSession):
    """Announces one worker and renews its lease every third of it, for as long as it is not closed."""

    def __init__(
        self,
        redis_url: str,
        record: WorkerRecord,
        lease_s: float = DEFAULT_LEASE_S,
        *,
        prefix: str = DEFAULT_PREFIX,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if lease_s < MIN_LEASE_S:
            raise RegistryError(f"a lease must last at least {MIN_LEASE_S} s, not {lease_s} s")
        super().__init__(redis_url, f"registrar of {record.worker_id}", timeout_s, max_backoff_s=lease_s / 3)
        self._names = Keyspace.under(prefix)
        self.record = record
        """The record as it is, or will next be, announced."""
        self._lease_s = lease_s
        self._updated = asyncio.Event()
        self.superseded_by: str | None = None
        """The newer incarnation that holds our worker id; we keep trying, and take over when its lease ends."""

    def update(self, record: WorkerRecord) -> None:
        """Announce a changed record at once: serving, draining. Id and incarnation must stay."""
        if record.key != self.record.key:
            raise RegistryError(f"an update of {self.record.worker_id} must keep its worker id and incarnation")
        self.record = record
        self._updated.set()

    async def close(self) -> None:
        """Stop renewing and withdraw the worker. With Redis away the lease simply runs out."""
        was_running = self._task is not None and self.connection_state is not ConnectionState.CLOSED
        await super().close()
        if not was_running:
            return
        arguments = (self.record.worker_id, self.record.incarnation, self._names.channel)
        try:
            async with open_client(self._redis_url, self._timeout_s) as client:
                await self._at_home(
                    client, lambda home: run_script(home, _WITHDRAW, self._names.keys, arguments, self._timeout_s)
                )
        except REDIS_FAILURES as error:
            text = "%s: could not withdraw, so the lease of %s s must run out: %s"
            logger.warning(text, self._name, self._lease_s, describe(error))

    async def _session(self, client: redis.asyncio.Redis) -> None:
        while True:
            self._updated.clear()
            await self._announce(client)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / 3):
                    await self._updated.wait()

    async def _announce(self, client: redis.asyncio.Redis) -> None:
        record = self.record
        lease_ms = round(self._lease_s * 1000)
        identity = (record.worker_id, record.incarnation)
        arguments = (*identity, encode_record(record), lease_ms, self._names.channel, int(bool(record.phase)))
        reply = await run_script(client, _ANNOUNCE, self._names.keys, arguments, self._timeout_s)
        superseded_by = reply.decode(errors="replace") if isinstance(reply, bytes) and reply else None
        if superseded_by is not None and superseded_by != self.superseded_by:
            logger.error(
                "%s: worker id %s is held by a newer process (incarnation %s, ours %s), so no router sends us work; "
                "give one of the two another id or stop it",
                self._name,
                record.worker_id,
                superseded_by,
                record.incarnation,
            )
        if superseded_by is None and self.superseded_by is not None:
            logger.warning("%s: worker id %s is ours again", self._name, record.worker_id)
        if superseded_by != self.superseded_by:
            self.superseded_by = superseded_by
        self._set_state(ConnectionState.CONNECTED)


class Membership(RedisSession):
    """Follows who is registered. What it knows survives Redis; see `Roster` for who leaves, and when.

    A change is noticed at once through the channel, a worker that died when its lease ends, and what the channel lost
    within `poll_s`. `grace_s` should be no shorter than the workers' leases.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        grace_s: float = DEFAULT_LEASE_S,
        poll_s: float = 1.0,
        prefix: str = DEFAULT_PREFIX,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if poll_s <= 0:
            raise RegistryError(f"the registry's poll interval must be positive, not {poll_s} s")
        super().__init__(redis_url, "membership", timeout_s, max_backoff_s=poll_s)
        self._names = Keyspace.under(prefix)
        self._poll_s = poll_s
        self._roster = Roster(grace_s)
        self._snapshot: tuple[WorkerRecord, ...] = ()
        self._starting: tuple[WorkerRecord, ...] = ()
        self._callbacks: list[Callable[[tuple[WorkerRecord, ...]], None]] = []
        self._bad_records: dict[str, bytes] = {}

    def snapshot(self) -> tuple[WorkerRecord, ...]:
        """The workers believed to serve, in order of id; with Redis away, the last known ones."""
        return self._snapshot

    def starting(self) -> tuple[WorkerRecord, ...]:
        """The workers that have announced themselves and do not serve yet: each record has a phase."""
        return self._starting

    def on_change(self, callback: Callable[[tuple[WorkerRecord, ...]], None]) -> None:
        """Call `callback` with the new snapshot, in the event loop, whenever a worker came, changed or went.

        Also when one that starts did.
        """
        self._callbacks.append(callback)

    async def _session(self, client: redis.asyncio.Redis) -> None:
        pubsub = client.pubsub()
        try:
            async with asyncio.timeout(self._timeout_s):
                await pubsub.subscribe(self._names.channel)
                # Only once the subscription is confirmed may we read, or a change between the two would go unnoticed.
                await pubsub.get_message(timeout=self._timeout_s)
            is_first = True
            while True:
                found = await run_script(client, _READ, self._names.keys, (), self._timeout_s)
                now_s = time.monotonic()
                if is_first:
                    self._roster.resume(now_s)
                    is_first = False
                self._roster.observe(now_s, self._read_sightings(found))
                self._set_state(ConnectionState.CONNECTED)
                self._publish()
                await self._wait_for_news(pubsub)
        finally:
            with contextlib.suppress(*REDIS_FAILURES):  # what is broken may fail to close; it is gone anyway
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _wait_for_news(self, pubsub: PubSub) -> None:
        """Return when something changed, when a lease should have been renewed, or after `poll_s`."""
        timeout_s = min(self._poll_s, max(0.01, self._roster.next_expiry_s() - time.monotonic()))
        for _ in range(_MAX_DRAINED_MESSAGES):  # a burst of messages costs one read
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
            if message is None:
                break
            words = message["data"].decode(errors="replace").split(" ")
            if len(words) == 3 and words[0] == "withdrawn":
                self._roster.withdraw(words[1], words[2])
            timeout_s = 0.0

    def _read_sightings(self, found: object) -> list[Sighting]:
        """Decode the reply of `_READ`. Bad records are skipped, each reported once."""
        sightings: list[Sighting] = []
        bad_records: dict[str, bytes] = {}
        flat = cast("list[bytes | int | None]", found)
        for raw_id, remaining_ms, raw_record in zip(flat[0::3], flat[1::3], flat[2::3], strict=True):
            worker_id = cast("bytes", raw_id).decode(errors="replace")
            data = cast("bytes | None", raw_record) or b""
            try:
                record = decode_record(data)
                if record.worker_id != worker_id:
                    raise InvalidRecord(f"worker record of {record.worker_id}")
            except InvalidRecord as error:
                if self._bad_records.get(worker_id) != data:
                    logger.warning("membership: ignoring what is registered as %.80r: %s", worker_id, error)
                bad_records[worker_id] = data
            else:
                sightings.append(Sighting(record, cast("int", remaining_ms) / 1000))
        self._bad_records = bad_records
        return sightings

    def _publish(self) -> None:
        serving = tuple(record for record in self._roster.records if not record.phase)
        starting = tuple(record for record in self._roster.records if record.phase)
        if (serving, starting) == (self._snapshot, self._starting):
            return
        self._snapshot, self._starting = serving, starting
        for callback in self._callbacks:
            try:
                callback(serving)
            except Exception:  # one follower's fault must neither stop the others nor the membership
                logger.exception("membership: a callback failed")
