"""Bounds the sequences in flight and the queue before them; answers 429 beyond."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.router.errors import overloaded


class Room:
    """One request's share of the room. Made by `Admission.admit`, which takes it back."""

    def __init__(self, num_sequences: int, give_back: Callable[[int], None]) -> None:
        self.on_grant: Callable[[], None] = lambda: None
        self.num_waiting = num_sequences
        self.num_free = 0
        """Sequences that may begin now."""
        self.num_begun = 0
        self._give_back = give_back

    def begin(self) -> None:
        """Note that one of the free places is taken."""
        self.num_free -= 1
        self.num_begun += 1

    def end(self) -> None:
        """Note that one that had begun has ended."""
        self.num_begun -= 1
        self._give_back(1)


class Admission:
    """First come, first served, sequence by sequence: requests that wait take turns, so that one of many sequences
    holds nobody up, and begins with as many as there is room for."""

    def __init__(self, capacity: int, max_queue: int, on_refusal: Callable[[], None] = lambda: None) -> None:
        self._capacity = capacity
        self._max_queue = max_queue
        self._on_refusal = on_refusal
        self._queue: deque[Room] = deque()
        self.num_running = 0
        self.num_waiting = 0

    @contextmanager
    def admit(self, num_sequences: int) -> Iterator[Room]:
        """The request's room, for as long as it lasts. Raises ApiError 429 when the queue is full."""
        room = Room(num_sequences, self._give_back)
        if self.num_running >= self._capacity and self._num_queued() + num_sequences > self._max_queue:
            self._on_refusal()
            raise overloaded(
                f"The server is full: {self.num_running} sequences run and {self.num_waiting} wait. Try again later."
            )
        self._queue.append(room)
        self.num_waiting += num_sequences
        self._give_back(0)
        try:
            yield room
        finally:
            if room.num_waiting:
                self._queue.remove(room)
                self.num_waiting -= room.num_waiting
            self._give_back(room.num_free + room.num_begun)

    def _num_queued(self) -> int:
        # A request that has begun is no longer in the queue, whatever it still waits for.
        return sum(room.num_waiting for room in self._queue if not (room.num_free or room.num_begun))

    def _give_back(self, num_sequences: int) -> None:
        self.num_running -= num_sequences
        while self._queue and self.num_running < self._capacity:
            room = self._queue.popleft()
            room.num_waiting -= 1
            room.num_free += 1
            self.num_waiting -= 1
            self.num_running += 1
            if room.num_waiting:
                self._queue.append(room)
            room.on_grant()
