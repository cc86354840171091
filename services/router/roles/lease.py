"""Makes one router the leader of a model's fleet, by a lease in Redis, and passes it what the others count.

One script call a second, from each router and each of its processes: it leaves the caller's account, and takes or
renews the lease where nobody else has it. The leader gets the accounts of all who have spoken lately. It counts its own
lease from before the call, and as a second shorter: it has stopped before another one can begin. Where Redis does not
answer there is no leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, cast

from kvstore.registry import raise_if_cancelled

LEASE_S: Final = 5.0
_MARGIN_S: Final = 1.0
TIMEOUT_S: Final = 0.5
"""Of one call."""

# The hash tag of the registry, as of the quotas.
_PREFIX: Final = "{tandem}:roles"

# KEYS: the lease, the accounts (hash). ARGV: the caller, lease in ms (0: it does not stand), its account.
# Answer: the leader, and if it is the caller the accounts of the last five seconds.
SCRIPT: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
redis.call('HSET', KEYS[2], ARGV[1], string.format('%.3f', now) .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[2], 60000)
local leader = redis.call('GET', KEYS[1])
if tonumber(ARGV[2]) > 0 and (not leader or leader == ARGV[1]) then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  leader = ARGV[1]
end
if leader ~= ARGV[1] then return {leader or ''} end
local answer = {leader}
local found = redis.call('HGETALL', KEYS[2])
for i = 1, #found, 2 do
  local said, account = string.match(found[i + 1], '^(%S+) (.*)$')
  if now - tonumber(said) > 5 then redis.call('HDEL', KEYS[2], found[i]) else answer[#answer + 1] = account end
end
return answer
"""

# KEYS as above. ARGV: the caller, who leads no more and counts no more.
RESIGN: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return redis.call('HDEL', KEYS[2], ARGV[1])
"""


class Scripts(Protocol):
    """Runs scripts in Redis (`kvstore.registry.Home`)."""

    async def eval(self, script: str, num_keys: int, *keys_and_arguments: str) -> object: ...


@dataclass(frozen=True)
class Beat:
    """What Redis has answered."""

    leader: str
    """Empty: nobody."""
    accounts: tuple[bytes, ...] | None
    """None: another one leads, or nobody."""


class Lease:
    """One router process's part in the leadership of one model. Event loop only."""

    def __init__(self, redis: Scripts, model: str, router_id: str, clock: Callable[[], float]) -> None:
        """`clock`: any that runs evenly."""
        self._redis = redis
        self._keys = f"{_PREFIX}:{model}", f"{_PREFIX}:{model}:accounts"
        self._router_id = router_id
        self._clock = clock
        self._held_until_s = 0.0

    @property
    def is_held(self) -> bool:
        """Whether nobody else can lead now."""
        return self._clock() < self._held_until_s

    async def beat(self, account: str, stands: bool) -> Beat:
        """Say the account, and take or renew the lease. Raises one of `REDIS_FAILURES`, after which it is not held."""
        asked_s, lease_ms = self._clock(), round(LEASE_S * 1000) if stands else 0
        held_until_s, self._held_until_s = self._held_until_s, 0.0
        async with asyncio.timeout(TIMEOUT_S):
            reply = await self._redis.eval(SCRIPT, 2, *self._keys, self._router_id, str(lease_ms), account)
        raise_if_cancelled()
        leader, *accounts = cast("list[bytes]", reply)
        if leader.decode() != self._router_id:
            return Beat(leader.decode(), None)
        self._held_until_s = max(asked_s + LEASE_S - _MARGIN_S, held_until_s)
        return Beat(self._router_id, tuple(accounts))

    async def resign(self) -> None:
        """Give it back. Raises one of `REDIS_FAILURES`."""
        self._held_until_s = 0.0
        async with asyncio.timeout(TIMEOUT_S):
            await self._redis.eval(RESIGN, 2, *self._keys, self._router_id)
