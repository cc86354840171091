"""Keeps the limits of keys and tenants for all routers together, in Redis; each for itself where Redis is away.

One script call before a request and one after it. It has 50 ms; a router that hears nothing in time keeps the limits by
itself, each divided by the number of routers that Redis last knew of (they note themselves with each call, a minute
long), and asks Redis again a second later. So limits hold about as well without Redis, and are never a reason to refuse
everybody or to let in everybody. What local buckets gave away is not booked in Redis afterwards.

An end that Redis has not heard of goes with the holder's next call: else each would hold its place among the requests
at a time until its lease runs out, ten minutes by default. So does a request whose `take` was not answered: Redis may
have booked it, and it runs on the local account or, where its client left meanwhile, not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Final, cast

from kvstore.registry import REDIS_FAILURES, Home, describe, open_home, raise_if_cancelled
from services.router.sharing.quota import Book, Kind, Verdict
from services.router.sharing.shares import Share

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 0.05
_RETRY_S: Final = 1.0
_MAX_CALLS: Final = 32  # at a time, each on a connection of its own
_KEPT_BOOKS: Final = 10_000
_KEPT_ENDS: Final = 1024  # of one holder; what is more runs out by itself
_ENDS_AT_ONCE: Final = 128
_KINDS: Final[tuple[Kind, ...]] = ("", "concurrent", "requests", "tokens")

# The hash tag of the registry: in a Redis Cluster all is on one node, to which one redirection leads.
_PREFIX: Final = "{tandem}:quota"

# KEYS: the buckets (hash), the leases (zset by end), the routers (zset by end), all of one holder.
# ARGV: take or settle, requests a minute, tokens a minute, most at a time, request, tokens, lease in seconds, router;
# then pairs: a request that has ended meanwhile, if it is known here, and its unused tokens.
# Answer: which limit refuses (0: none), requests left, tokens left, running, routers. Floats as text: Redis cuts them.
SCRIPT: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local rpm, tpm, most = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local want = tonumber(ARGV[6])
local old = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local minutes = math.max(now - (tonumber(old[3]) or now), 0) / 60
local requests = math.min((tonumber(old[1]) or rpm) + rpm * minutes, rpm)
local tokens = math.min((tonumber(old[2]) or tpm) + tpm * minutes, tpm)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
for i = 9, #ARGV, 2 do
  if redis.call('ZREM', KEYS[2], ARGV[i]) == 1 and tpm > 0 then
    tokens = math.min(tokens + tonumber(ARGV[i + 1]), tpm)
  end
end
local refused = 0
if ARGV[1] == 'settle' then
  if tpm > 0 then tokens = math.min(tokens + want, tpm) end
  redis.call('ZREM', KEYS[2], ARGV[5])
elseif most > 0 and redis.call('ZCARD', KEYS[2]) >= most then refused = 1
elseif rpm > 0 and requests < 1 then refused = 2
elseif tpm > 0 and tokens < want then refused = 3
else
  if rpm > 0 then requests = requests - 1 end
  if tpm > 0 then tokens = tokens - want end
  redis.call('ZADD', KEYS[2], now + tonumber(ARGV[7]), ARGV[5])
  local lease_ms = math.ceil(tonumber(ARGV[7]) * 1000) + 1000
  if redis.call('PTTL', KEYS[2]) < lease_ms then redis.call('PEXPIRE', KEYS[2], lease_ms) end
end
redis.call('HSET', KEYS[1], 'requests', string.format('%.6f', requests), 'tokens', string.format('%.6f', tokens),
  'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], 3600000)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
redis.call('ZADD', KEYS[3], now + 60, ARGV[8])
redis.call('PEXPIRE', KEYS[3], 61000)
return {refused, string.format('%.6f', requests), string.format('%.6f', tokens), redis.call('ZCARD', KEYS[2]),
  redis.call('ZCARD', KEYS[3])}
"""


@dataclass(frozen=True)
class Taken:
    """A request's part of its holder's limits. `verdict` says whether there is one."""

    holder: str
    share: Share
    """As it was applied: where Redis is away, this router's part of it."""
    request: str
    num_tokens: int
    verdict: Verdict
    is_local: bool


class Quotas:
    """All limits, as one router sees them. Event loop only."""

    def __init__(
        self,
        client: Home | None,
        router_id: str,
        clock: Callable[[], float],
        num_routers: int = 1,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`client` None: there is no Redis, and this is the only router. `clock`: any that runs evenly.

        `num_routers`: so many there are at least, this one and its siblings on the same port."""
        self._timeout_s = timeout_s
        self._client = client
        self._router_id = router_id
        self._clock = clock
        self._calls = asyncio.Semaphore(_MAX_CALLS)
        self._least_routers = self._num_routers = num_routers
        self._noted_until_s = 0.0
        self._ask_again_s = 0.0
        self._books: dict[str, Book] = {}  # the one used longest ago first
        self._ends: dict[str, dict[str, int]] = {}  # that Redis has not heard of: unused tokens, by holder and request

    @property
    def is_shared(self) -> bool:
        """Whether Redis keeps the limits, as far as is known."""
        return self._client is not None and self._clock() >= self._ask_again_s

    async def take(self, holder: str, share: Share, request: str, num_tokens: int, lease_s: float) -> Taken:
        """Take a request's part of the limits. `lease_s`: when it has ended at the latest, were we to die."""
        verdict = await self._ask("take", holder, share, request, num_tokens, lease_s)
        if verdict is not None:
            return Taken(holder, share, request, num_tokens, verdict, is_local=False)
        own, now_s = share.part(self._num_routers), self._clock()
        book = self._book(holder, own, now_s)
        return Taken(
            holder, own, request, num_tokens, book.take(own, request, num_tokens, lease_s, now_s), is_local=True
        )

    async def settle(self, taken: Taken, num_used_tokens: int) -> None:
        """End a request that was let in, of which so many tokens were used."""
        num_unused = taken.num_tokens - num_used_tokens
        if taken.is_local:
            self._book(taken.holder, taken.share, self._clock()).settle(
                taken.share, taken.request, num_unused, self._clock()
            )
        elif await self._ask("settle", taken.holder, taken.share, taken.request, num_unused, 0.0) is None:
            self._note_end(taken.holder, taken.request, num_unused)

    async def _ask(
        self, verb: str, holder: str, share: Share, request: str, num_tokens: int, lease_s: float
    ) -> Verdict | None:
        """Run the script; None where Redis does not answer in time."""
        if not self.is_shared:
            return None
        assert self._client is not None, "nobody is asked where there is no Redis"
        base = f"{_PREFIX}:{holder}"
        limits = (share.requests_per_minute, share.tokens_per_minute, share.max_concurrent)
        ends = list(self._ends.get(holder, {}).items())[:_ENDS_AT_ONCE]
        arguments = (verb, *limits, request, num_tokens, lease_s, self._router_id, *chain.from_iterable(ends))
        is_heard = False
        try:
            async with asyncio.timeout(self._timeout_s), self._calls:
                keys = (base, f"{base}:running", f"{base}:routers")
                reply = await self._client.eval(SCRIPT, 3, *keys, *map(str, arguments))
            raise_if_cancelled()
            is_heard = True
            self._forget_ends(holder, ends)
            refused, requests, tokens, running, routers = cast("list[bytes | int]", reply)
            self._note_routers(int(routers))
            return Verdict(_KINDS[int(refused)], float(requests), float(tokens), int(running))
        except REDIS_FAILURES as error:
            text = "limits of keys and tenants: no answer from Redis (%s); this router keeps 1/%d of each by itself"
            log.warning(text, describe(error), self._num_routers)
            self._ask_again_s = self._clock() + _RETRY_S
            return None
        finally:
            if not is_heard:
                self._note_end(holder, request, num_tokens)

    def _note_end(self, holder: str, request: str, num_unused: int) -> None:
        ends = self._ends.setdefault(holder, {})
        ends[request] = num_unused
        if len(ends) > _KEPT_ENDS:
            del ends[next(iter(ends))]
        if len(self._ends) > _KEPT_BOOKS:
            del self._ends[next(iter(self._ends))]

    def _forget_ends(self, holder: str, told: Iterable[tuple[str, int]]) -> None:
        ends = self._ends.get(holder, {})
        for request, _ in told:
            ends.pop(request, None)
        if not ends:
            self._ends.pop(holder, None)

    def _note_routers(self, num_routers: int) -> None:
        """The most that any holder met within a minute: not every key comes to every router."""
        now_s = self._clock()
        if num_routers >= self._num_routers or now_s >= self._noted_until_s:
            self._num_routers, self._noted_until_s = max(num_routers, self._least_routers), now_s + 60

    def _book(self, holder: str, share: Share, now_s: float) -> Book:
        book = self._books.pop(holder, None) or Book.full(share, now_s)
        self._books[holder] = book
        if len(self._books) > _KEPT_BOOKS:
            del self._books[next(iter(self._books))]
        return book


@contextlib.asynccontextmanager
async def open_quotas(
    redis_url: str, router_id: str, clock: Callable[[], float], num_routers: int
) -> AsyncIterator[Quotas]:
    """Keep limits in that Redis, which need not be there. The URL is well-formed: the registry has it, too."""
    async with open_home(redis_url, TIMEOUT_S) as home:
        yield Quotas(home, router_id, clock, num_routers)
