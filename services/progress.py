"""Decides whether the parts of a process get on: each must advance while it has work. Pure: the clock is passed in.

    a part     no work, or it advanced    it had work and stood still
    gets on    gets on                    stuck, once that is longer than it is allowed
    stuck      gets on                    stuck; once that is too long by a limit, the process should end

Deadlines judge progress, so a part that takes long over much is not stuck: its watch allows for what it works on.
Nobody is blamed where the watcher itself did not run (a stopped process, a debugger, a suspended laptop): of the time
between two looks at most twice the interval counts, less that in which the process waited for a processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Watch:
    """One part: an event loop, a thread. `advanced` is called by that part alone; the rest belongs to the watcher."""

    name: str
    has_work: Callable[[], bool]
    """Whether it should advance. Called by the watcher, so it only reads what any thread may read."""
    allowed_s: Callable[[], float]
    """How long it may stand still, in view of what it works on now."""
    is_curable: Callable[[], bool] = lambda: True
    """Whether a new start of the process may help, and is worth what it costs. It does not where a disk hangs."""
    num_advances: int = 0

    def advanced(self) -> None:
        """Note that the part has got on."""
        self.num_advances += 1


@dataclass
class _Seen:
    """A watch as it was at the last look."""

    watch: Watch
    num_advances: int = 0
    still_s: float = 0.0


@dataclass
class Progress:
    """All watches of a process. One watcher calls `look` every `interval_s`."""

    watches: Sequence[Watch]
    interval_s: float
    _seen: list[_Seen] = field(init=False)
    _looked_at_s: float | None = None

    def __post_init__(self) -> None:
        self._seen = [_Seen(watch, watch.num_advances) for watch in self.watches]

    def look(self, now_s: float, starved_s: float = 0.0) -> None:
        """Compare with the last look. Since then a thread of the process has waited `starved_s` for a processor."""
        before_s, self._looked_at_s = self._looked_at_s, now_s
        passed_s = 0.0 if before_s is None else min(now_s - before_s, 2 * self.interval_s)
        passed_s = max(0.0, passed_s - starved_s)
        for seen in self._seen:
            # In this order: work that ended in between was an advance, and counts as one.
            has_work, num_advances = seen.watch.has_work(), seen.watch.num_advances
            is_still = has_work and num_advances == seen.num_advances
            seen.still_s = seen.still_s + passed_s if is_still else 0.0
            seen.num_advances = num_advances

    def still_s(self) -> dict[str, float]:
        """Seconds that each part has stood still although it had work; 0: it gets on."""
        return {seen.watch.name: seen.still_s for seen in self._seen}

    def stuck(self) -> tuple[str, ...]:
        """The parts that have stood still for longer than they are allowed."""
        return tuple(seen.watch.name for seen in self._seen if seen.still_s > seen.watch.allowed_s())

    def overdue(self, limit_s: float) -> tuple[str, ...]:
        """Those of them that a new start may cure, and whose standstill exceeds what they are allowed by `limit_s`."""
        return tuple(
            seen.watch.name
            for seen in self._seen
            if seen.watch.is_curable() and seen.still_s > seen.watch.allowed_s() + limit_s
        )
