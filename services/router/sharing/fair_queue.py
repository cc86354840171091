"""Orders those who wait: by priority, among equals by what their tenants have had, within a tenant first come.

An item may have a moment up to which its turn is of use: behind that its first token would come too late. Then it
yields to those of its tenant that can still be in time, but for each eighth turn, so that nobody waits for ever. Else a
queue that has once grown too long makes everybody late, and nothing that is served is in time.

Pure. The fair part is VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), with weights: each
tenant has a counter of the tokens that it was served, divided by its weight, and the lowest one's next item is next.
While two tenants both wait, what they have had differs by no more than a bound that does not grow. A counter that rose
while nobody else waited is no debt, and idleness no credit: whoever comes back to the queue is lifted to the lowest
counter there (or to that of whoever left it last), so a tenant of yesterday does not lock out one of today.

    push     its tenant was not waiting: counter = max(its own, the lowest of those that wait; if none, the last one's)
    pop      the smallest priority; there the tenant with the lowest counter, but for those that have enough at the
             moment; its oldest item
    charge   counter += tokens / weight: the prompt's at the start, the answer's as they come
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

OUTPUT_TOKEN_COST = 2.0
"""Of a generated token against a prompt's, as in the paper: it takes a step of its own."""
_MAX_IDLE_TENANTS = 4096
_MAX_PASSED = 7
"""Turns in a row in which a tenant's late items are passed over."""


@dataclass(eq=False)
class _Waiting(Generic[T]):
    item: T
    num_tokens: float
    due_s: float


class _Line(Generic[T]):
    """One tenant's items of one priority, the oldest first, and apart from them those that were found too late."""

    def __init__(self) -> None:
        self.timely: deque[_Waiting[T]] = deque()
        self.late: deque[_Waiting[T]] = deque()
        self.num_timely_tokens = 0.0
        self.num_tokens = 0.0
        self._num_passed = 0  # turns in which late ones were passed over, since one had its own

    def __len__(self) -> int:
        return len(self.timely) + len(self.late)

    def add(self, waiting: _Waiting[T]) -> None:
        """Put it behind the others."""
        self.timely.append(waiting)
        self.num_timely_tokens += waiting.num_tokens
        self.num_tokens += waiting.num_tokens

    def take_next(self, now_s: float) -> _Waiting[T]:
        """Remove and return whose turn it is. There must be one."""
        while self.timely and self.timely[0].due_s < now_s:
            self.late.append(self._without(self.timely, 0))
        if self.timely and not (self.late and self._num_passed >= _MAX_PASSED):
            self._num_passed = self._num_passed + 1 if self.late else 0
            return self._taken(self._without(self.timely, 0))
        self._num_passed = 0
        return self._taken(self.late.popleft())

    def take(self, item: T) -> bool:
        """Remove an item; False if it is not here."""
        for index, waiting in enumerate(self.timely):
            if waiting.item is item:
                self._taken(self._without(self.timely, index))
                return True
        for waiting in self.late:
            if waiting.item is item:
                self.late.remove(self._taken(waiting))
                return True
        return False

    def _without(self, timely: deque[_Waiting[T]], index: int) -> _Waiting[T]:
        waiting = timely[index]
        del timely[index]
        self.num_timely_tokens -= waiting.num_tokens
        return waiting

    def _taken(self, waiting: _Waiting[T]) -> _Waiting[T]:
        self.num_tokens -= waiting.num_tokens
        return waiting


class FairQueue(Generic[T]):
    """Items with a tenant, a priority (smaller is sooner) and the tokens that they stand for."""

    def __init__(self, weight_of: Callable[[str], float] = lambda tenant: 1.0) -> None:
        self._weight_of = weight_of
        self._levels: dict[int, dict[str, _Line[T]]] = {}
        self._counters: dict[str, float] = {}
        self._last_left = 0.0  # the counter of whoever left the queue last
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    @property
    def num_tokens(self) -> float:
        """Of all that wait."""
        return sum(line.num_tokens for lines in self._levels.values() for line in lines.values())

    def push(self, item: T, tenant: str, num_tokens: float, priority: int = 0, due_s: float = math.inf) -> None:
        """Add an item at the end of its tenant's line. `due_s`: the last moment, by the caller's clock, at which its
        turn is of use."""
        if not self._is_waiting(tenant):
            self._counters[tenant] = self._entry_counter(tenant)
        line = self._levels.setdefault(priority, {}).setdefault(tenant, _Line())
        line.add(_Waiting(item, num_tokens, due_s))
        self._num_items += 1

    def pop(
        self, has_enough: Callable[[str], bool] = lambda tenant: False, now_s: float = -math.inf
    ) -> tuple[T, str] | None:
        """Remove and return the next item and its tenant; None if nobody waits but tenants that have enough."""
        for priority in sorted(self._levels):
            tenants = [tenant for tenant in self._levels[priority] if not has_enough(tenant)]
            if tenants:
                tenant = min(tenants, key=lambda each: self._counters[each])
                item = self._levels[priority][tenant].take_next(now_s).item
                self._taken(priority, tenant)
                return item, tenant
        return None

    def remove(self, item: T, tenant: str, priority: int = 0) -> None:
        """Take out an item that has given up. Raises ValueError if it does not wait."""
        line = self._levels.get(priority, {}).get(tenant)
        if line is None or not line.take(item):
            raise ValueError(f"an item of {tenant!r} does not wait")
        self._taken(priority, tenant)

    def charge(self, tenant: str, num_tokens: float) -> None:
        """The tenant was served so many tokens."""
        self._counters[tenant] = self._counters.get(tenant, self._last_left) + num_tokens / self._weight_of(tenant)

    def counter(self, tenant: str) -> float:
        """What the tenant has had, in tokens over weight; only differences mean something."""
        return self._counters.get(tenant, self._last_left)

    def tokens_ahead(self, tenant: str, priority: int = 0) -> float:
        """Tokens that would be served before a new item of this tenant, if nobody else came any more: it passes those
        of its own tenant that are late."""
        ahead = sum(
            line.num_tokens for level, lines in self._levels.items() if level < priority for line in lines.values()
        )
        lines = self._levels.get(priority, {})
        own = lines[tenant].num_timely_tokens if tenant in lines else 0.0
        counter = self._counters[tenant] if self._is_waiting(tenant) else self._entry_counter(tenant)
        # The virtual time at which its own items are through; others are served until they have had as much.
        turn = counter + own / self._weight_of(tenant)
        for other, line in lines.items():
            if other != tenant:
                ahead += min(line.num_tokens, max(0.0, (turn - self._counters[other]) * self._weight_of(other)))
        return ahead + own

    def _taken(self, priority: int, tenant: str) -> None:
        """One of its line has left."""
        lines = self._levels[priority]
        self._num_items -= 1
        if not len(lines[tenant]):
            del lines[tenant]
            self._last_left = self._counters[tenant]
        if not lines:
            del self._levels[priority]
        self._forget_idle()

    def _is_waiting(self, tenant: str) -> bool:
        return any(tenant in lines for lines in self._levels.values())

    def _entry_counter(self, tenant: str) -> float:
        counters = [self._counters[each] for lines in self._levels.values() for each in lines]
        return max(self._counters.get(tenant, 0.0), min(counters, default=self._last_left))

    def _forget_idle(self) -> None:
        """Drop the counters that say nothing: whoever comes back below the lowest is lifted to it in any case."""
        if len(self._counters) <= _MAX_IDLE_TENANTS:
            return
        waiting = {tenant for lines in self._levels.values() for tenant in lines}
        lowest = min((self._counters[each] for each in waiting), default=self._last_left)
        kept = {each: counter for each, counter in self._counters.items() if each in waiting or counter > lowest}
        # Of those that are owed nothing and owe, the deepest in debt are remembered.
        owing = sorted(kept.keys() - waiting, key=lambda each: kept[each])
        for each in owing[: max(0, len(kept) - _MAX_IDLE_TENANTS)]:
            del kept[each]
        self._counters = kept
