"""How much the router takes on: a bounded number of sequences in flight, a bounded queue before it, 429 beyond."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.router.errors import overloaded


class Admission:
    """First come, first served. A request weighs as many as it has sequences; one that weighs more than there is room
    for in all is let in when it would be alone."""

    def __init__(self, capacity: int, max_queue: int, on_refusal: Callable[[], None] = lambda: None) -> None:
        self._capacity = capacity
        self._max_queue = max_queue
        self._on_refusal = on_refusal
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.num_running = 0
        self.num_waiting = 0

    @asynccontextmanager
    async def admit(self, num_sequences: int) -> AsyncIterator[None]:
        """Waits for room and holds it. Raises ApiError 429 when the queue is full."""
        weight = min(num_sequences, self._capacity)
        await self._enter(weight)
        try:
            yield
        finally:
            self.num_running -= weight
            self._wake()

    async def _enter(self, weight: int) -> None:
        if not self._queue and self.num_running + weight <= self._capacity:
            self.num_running += weight
            return
        if self.num_waiting + weight > self._max_queue:
            self._on_refusal()
            raise overloaded(
                f"The server is full: {self.num_running} sequences run and {self.num_waiting} wait. Try again later."
            )
        entry = (weight, asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        self.num_waiting += weight
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry in self._queue:
                self._queue.remove(entry)
                self.num_waiting -= weight
            elif not entry[1].cancelled():  # let in and cancelled in the same moment
                self.num_running -= weight
            self._wake()
            raise

    def _wake(self) -> None:
        while self._queue and self.num_running + self._queue[0][0] <= self._capacity:
            weight, admitted = self._queue.popleft()
            self.num_waiting -= weight
            if not admitted.cancelled():
                self.num_running += weight
                admitted.set_result(None)
