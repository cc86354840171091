"""Adds up the metrics of several processes, those that have ended among them. Pure.

A counter must never go backwards: who scrapes would take that for a restart, and all that is left for new. So of a
process that has ended, what it had counted when it was last asked stays in the sums, and one that does not answer in
time stands there with what it said the time before. What a killed process has counted since it was last asked is lost;
nobody has seen it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Final, Literal

import msgspec

Merge = Literal["sum", "max", "min"]
"""What a gauge of a whole router is, of those of its processes."""

_COUNTS: Final = frozenset({"counter", "histogram"})
_MERGES: Final[dict[Merge, Callable[[float, float], float]]] = {"sum": operator.add, "max": max, "min": min}

Key = tuple[str, tuple[tuple[str, str], ...]]


class Sample(msgspec.Struct, array_like=True, frozen=True):
    """One value of a series."""

    name: str
    labels: dict[str, str]
    value: float

    @property
    def key(self) -> Key:
        return self.name, tuple(sorted(self.labels.items()))


class Family(msgspec.Struct, array_like=True):
    """A family as prometheus-client collects it, and how its values are joined over processes."""

    name: str
    documentation: str
    type: str
    unit: str
    merge: Merge
    samples: list[Sample]


class Snapshot(msgspec.Struct, array_like=True):
    """All series of one process at one moment, or of several together."""

    families: list[Family]


def merged(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The families of all, each series once, in the order in which they are met first."""
    families: dict[str, Family] = {}
    values: dict[str, dict[Key, Sample]] = {}
    for snapshot in snapshots:
        for family in snapshot.families:
            families.setdefault(family.name, family)
            join = _MERGES["sum" if family.type in _COUNTS else family.merge]
            found = values.setdefault(family.name, {})
            for sample in family.samples:
                before = found.get(sample.key)
                value = sample.value if before is None else join(before.value, sample.value)
                found[sample.key] = Sample(sample.name, sample.labels, value)
    return Snapshot([msgspec.structs.replace(families[name], samples=list(values[name].values())) for name in families])


class Totals:
    """What a router's processes have said last, by their numbers, and what ended ones had counted."""

    def __init__(self) -> None:
        self._last: dict[int, Snapshot] = {}
        self._ended = Snapshot([])

    def note(self, number: int, snapshot: Snapshot) -> None:
        """Take over what a process says now."""
        self._last[number] = snapshot

    def end(self, number: int) -> None:
        """The process of this number has ended: what it counted stays, what it measured does not."""
        last = self._last.pop(number, Snapshot([]))
        counts = [family for family in last.families if family.type in _COUNTS]
        self._ended = merged([self._ended, Snapshot(counts)])

    def snapshot(self) -> Snapshot:
        """All together."""
        return merged([*(self._last[number] for number in sorted(self._last)), self._ended])
