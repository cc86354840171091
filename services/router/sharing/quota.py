"""Keeps one key's or tenant's limits: requests and tokens a minute as buckets, requests at a time as leases. Pure.

The same arithmetic runs in Redis, for all routers together (`redis_quotas.SCRIPT`), and here where Redis is away; the
tests hold the one against the other.

    take    refill both buckets; drop leases that have run out; refuse where one has too little, else take from each
    settle  give back what was taken for tokens that never came, or take what came beyond; end the lease

A bucket holds a minute's worth and refills evenly, so a burst of that size is let through. What a request takes of the
tokens is its prompt and the `max_tokens` that it names; its answer's true length is settled at its end, and may leave
a bucket below zero: then its holder waits until that is paid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from services.router.sharing.shares import Share

Kind = Literal["", "concurrent", "requests", "tokens"]
RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)


@dataclass(frozen=True)
class Verdict:
    """What came of a request, and what its holder has left. Infinity: no limit."""

    refused: Kind
    """Which limit refuses it; empty: none."""
    requests: float
    """That may come now."""
    tokens: float
    num_running: int


@dataclass
class Book:
    """One holder's buckets and leases."""

    requests: float
    tokens: float
    at_s: float
    """When the buckets were refilled."""
    leases: dict[str, float] = field(default_factory=dict)
    """Until when, by request."""

    @classmethod
    def full(cls, share: Share, now_s: float) -> Book:
        return cls(float(share.requests_per_minute), float(share.tokens_per_minute), now_s)

    def take(self, share: Share, request: str, num_tokens: int, lease_s: float, now_s: float) -> Verdict:
        """Take a request's part, or say which limit forbids it."""
        self._refill(share, now_s)
        self.leases = {each: until_s for each, until_s in self.leases.items() if until_s > now_s}
        refused: Kind = ""
        if share.max_concurrent and len(self.leases) >= share.max_concurrent:
            refused = "concurrent"
        elif share.requests_per_minute and self.requests < 1:
            refused = "requests"
        elif share.tokens_per_minute and self.tokens < num_tokens:
            refused = "tokens"
        else:
            self.requests -= 1 if share.requests_per_minute else 0
            self.tokens -= num_tokens if share.tokens_per_minute else 0
            self.leases[request] = now_s + lease_s
        return Verdict(refused, self.requests, self.tokens, len(self.leases))

    def settle(self, share: Share, request: str, num_unused_tokens: int, now_s: float) -> None:
        """End a request: so many of its tokens were not used, or (negative) more were."""
        self._refill(share, now_s)
        if share.tokens_per_minute:
            self.tokens = min(self.tokens + num_unused_tokens, share.tokens_per_minute)
        self.leases.pop(request, None)

    def _refill(self, share: Share, now_s: float) -> None:
        minutes = max(now_s - self.at_s, 0.0) / 60
        self.requests = min(self.requests + share.requests_per_minute * minutes, share.requests_per_minute)
        self.tokens = min(self.tokens + share.tokens_per_minute * minutes, share.tokens_per_minute)
        self.at_s = now_s


def wait_s(share: Share, verdict: Verdict, num_tokens: int) -> float:
    """Seconds after which the request that was refused would be let in; 1 where that depends on others' ends."""
    if verdict.refused == "requests":
        return (1 - verdict.requests) * 60 / share.requests_per_minute
    if verdict.refused == "tokens":
        return (num_tokens - verdict.tokens) * 60 / share.tokens_per_minute
    return 1.0


def headers(share: Share, verdict: Verdict) -> list[tuple[bytes, bytes]]:
    """OpenAI's `x-ratelimit-*`: the limit, what remains, and when it will be whole again, of requests and of tokens."""
    lines: list[tuple[bytes, bytes]] = []
    for name, limit, left in (
        ("requests", share.requests_per_minute, verdict.requests),
        ("tokens", share.tokens_per_minute, verdict.tokens),
    ):
        if limit:
            whole_again_s = (limit - left) * 60 / limit
            lines += [
                (f"x-ratelimit-limit-{name}".encode(), str(limit).encode()),
                (f"x-ratelimit-remaining-{name}".encode(), str(max(int(left), 0)).encode()),
                (f"x-ratelimit-reset-{name}".encode(), duration(whole_again_s).encode()),
            ]
    return lines


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.3g}s"
