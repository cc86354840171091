"""Says every ten seconds what a store node does, from the series that it exports anyway."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

Series = dict[tuple[str, str], float]  # by name and tier


def store_series(registry: CollectorRegistry) -> Series:
    """A store node's own series, those without a tier under ""."""
    found: Series = defaultdict(float)
    for family in registry.collect():
        if family.name.startswith("tandem:store_"):
            for each in family.samples:
                found[each.name, each.labels.get("tier", "")] += each.value
    return found


@dataclass
class StoreActivity:
    """Makes the lines of one store node, each of what has happened since the one before."""

    read: Callable[[], Series]
    clock: Callable[[], float] = time.monotonic
    _before: Series = field(init=False)
    _since_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._before, self._since_s = self.read(), self.clock()

    def line(self) -> str:
        """The next line; empty where nobody took or brought anything."""
        now, now_s, before = self.read(), self.clock(), self._before
        seconds = max(now_s - self._since_s, 1e-9)
        self._before, self._since_s = now, now_s

        def new(name: str, tier: str = "") -> float:
            return now[name, tier] - before[name, tier]

        num_bytes = new("tandem:store_pulled_bytes_total")
        num_missed = new("tandem:store_queries_total", "none")
        num_hits = new("tandem:store_queries_total", "dram") + new("tandem:store_queries_total", "disk")
        num_asked = num_hits + num_missed
        if not (num_bytes or num_asked):
            return ""
        return (
            f"Blocks in memory: {now['tandem:store_blocks', 'dram']:.0f} of {now['tandem:store_slots', '']:.0f}, "
            f"on disk: {now['tandem:store_blocks', 'disk']:.0f}, Taken in: {num_bytes / seconds / 1e6:.1f} MB/s, "
            f"Asked for: {num_asked / seconds:.1f} blocks/s, Hit rate: {num_hits / max(num_asked, 1):.1%}"
        )
