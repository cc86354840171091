"""Computes goodput: the requests per second that meet all service level objectives (DistServe, OSDI'24)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loadtest.plan.records import RequestRecord

_NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "99th percentile of gaps between chunks",
    "itl_max": "longest gap between chunks",
    "e2el": "end-to-end latency",
}


@dataclass(frozen=True)
class Slo:
    """The objectives that a good request meets: limits in seconds, by name."""

    limits_s: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Parses `ttft:2000,tpot:100` (milliseconds; blanks separate as well). Raises ValueError."""
        limits: dict[str, float] = {}
        for part in filter(None, re.split(r"[,\s]+", text)):
            name, _, value = part.partition(":")
            if name not in _NAMES:
                raise ValueError(f"{name!r} is no objective; there are {', '.join(_NAMES)}")
            try:
                limits[name] = float(value) / 1000
            except ValueError:
                raise ValueError(f"{part!r} is not NAME:MILLISECONDS") from None
            if not limits[name] > 0:
                raise ValueError(f"{part!r}: the limit must be positive")
        if not limits:
            raise ValueError("no objective is given")
        return cls(tuple(limits.items()))

    def is_met(self, record: RequestRecord) -> bool:
        """Errors and refusals never meet it. An answer of one token has no TPOT and no gap: these are met."""
        if not record.ok:
            return False
        measured = {
            "ttft": record.ttft_s,
            "tpot": record.tpot_s,
            "itl": record.itl_s,
            "itl_max": max(record.gaps_s, default=None),
            "e2el": record.e2e_s,
        }
        for name, limit_s in self.limits_s:
            value = measured[name]
            if value is not None and value > limit_s:
                return False
        return True

    def __str__(self) -> str:
        return " and ".join(f"{_NAMES[name]} ≤ {limit_s * 1000:g} ms" for name, limit_s in self.limits_s)


def num_good(records: Iterable[RequestRecord], slo: Slo) -> int:
    """Counts the good requests."""
    return sum(map(slo.is_met, records))
