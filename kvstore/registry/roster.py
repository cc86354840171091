"""Decides who is alive, for the registry's reader. No I/O: observations and a clock in, a list of workers out.

A worker leaves the roster when it says so, or when its last seen lease has run out by our own clock. To be missing from
Redis is not enough: after a restart or a flush it is empty until the workers announce themselves again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.registry.worker_record import WorkerRecord


@dataclass(frozen=True)
class Sighting:
    """One worker as found in Redis, with what was left of its lease."""

    record: WorkerRecord
    remaining_s: float


@dataclass(frozen=True)
class _Entry:
    record: WorkerRecord
    keep_until_s: float


class Roster:
    """The last known membership. `grace_s`: how long workers have to announce themselves again after Redis was away."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._entries: dict[str, _Entry] = {}
        self._grace_until_s = -math.inf

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        """The workers believed to be alive, in order of id."""
        return tuple(self._entries[worker_id].record for worker_id in sorted(self._entries))

    def resume(self, now_s: float) -> None:
        """Redis can be read again after a gap: nobody's lease could be seen to be renewed meanwhile."""
        self._grace_until_s = now_s + self._grace_s
        for worker_id, entry in self._entries.items():
            self._entries[worker_id] = _Entry(entry.record, max(entry.keep_until_s, self._grace_until_s))

    def observe(self, now_s: float, sightings: Iterable[Sighting]) -> None:
        """Take in all that Redis holds now, and drop those whose last known lease has run out."""
        for sighting in sightings:
            record = sighting.record
            known = self._entries.get(record.worker_id)
            # Right after a flush the loser of an id conflict may announce itself first; the winner is still the winner.
            if known and record.incarnation < known.record.incarnation and now_s < known.keep_until_s:
                continue
            keep_until_s = now_s + sighting.remaining_s
            if known and known.record.incarnation == record.incarnation and now_s < self._grace_until_s:
                # What Redis has come back with may be of before: such a lease ends sooner than its worker can renew it.
                keep_until_s = max(keep_until_s, min(known.keep_until_s, self._grace_until_s))
            self._entries[record.worker_id] = _Entry(record, keep_until_s)
        expired = [worker_id for worker_id, entry in self._entries.items() if entry.keep_until_s <= now_s]
        for worker_id in expired:
            del self._entries[worker_id]

    def withdraw(self, worker_id: str, incarnation: str) -> None:
        """The worker said goodbye. A goodbye of an incarnation that has been succeeded changes nothing."""
        known = self._entries.get(worker_id)
        if known and known.record.incarnation == incarnation:
            del self._entries[worker_id]

    def next_expiry_s(self) -> float:
        """Return when the first lease runs out unless it is renewed; infinity if there is none."""
        return min((entry.keep_until_s for entry in self._entries.values()), default=float("inf"))
