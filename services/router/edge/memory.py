"""Bounds the memory that requests hold in the router: bodies, what came of them, and answers in one piece.

Small requests are not counted, so that they are served whatever the large ones do. One client may hold a share. What is
given back goes back to the system, too: the allocator would keep it for another request like it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from kvstore.threads import Threads
from services.machine import trim_memory
from services.router.errors import overloaded

log = logging.getLogger(__name__)

SMALL_BYTES = 1 << 16
"""Of a request; what it has beyond that counts."""
_WORTH_TRIMMING_BYTES = 1 << 18
_TRIM_AFTER_S = 0.5
_MANY_SEQUENCES = 16


class RequestMemory:
    """The books. Belongs to the event loop."""

    def __init__(
        self,
        max_bytes: int,
        client_share: float,
        threads: Threads,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_of_one = int(max_bytes * client_share)
        self._threads = threads
        self._on_refusal = on_refusal
        self._held: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._trimming: asyncio.Task[None] | None = None

    @property
    def num_bytes(self) -> int:
        """What all requests hold."""
        return self._held.total()

    def hold(self, client: str) -> Holding:
        """For one request of the client's; use it by `with`."""
        return Holding(self, client)

    def take(self, client: str, num_bytes: int) -> None:
        """Raises ApiError 429."""
        if self._held[client] + num_bytes > self._max_bytes_of_one or self._held.total() + num_bytes > self._max_bytes:
            self._on_refusal()
            raise overloaded(
                f"Large requests hold {self.num_bytes} bytes of the server's memory, {self._held[client]} of them"
                " yours. Try again later."
            )
        self._held[client] += num_bytes

    def give_back(self, client: str, num_bytes: int) -> None:
        """Once a request has ended, or its body is not needed any more."""
        self._held[client] -= num_bytes
        if not self._held[client]:
            del self._held[client]
        if num_bytes >= _WORTH_TRIMMING_BYTES:
            self.trim_soon()

    def trim_soon(self) -> None:
        """Give memory back to the system in a moment: a large request has ended."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim)

    async def close(self) -> None:
        """Ends what it has begun."""
        if self._timer is not None:
            self._timer.cancel()
        if self._trimming is not None:
            await asyncio.wait([self._trimming])

    def _trim(self) -> None:
        self._timer = None
        if self._trimming is None or self._trimming.done():
            # A request's parts know each other. What was there at the start is frozen, so this takes milliseconds.
            gc.collect()
            self._trimming = asyncio.create_task(self._threads.run(trim_memory), name="trim memory")


class Holding:
    """What one request holds, until its block ends."""

    def __init__(self, memory: RequestMemory, client: str) -> None:
        self._memory = memory
        self._client = client
        self._num_bytes = 0
        self._is_large = False

    def note_sequences(self, num_sequences: int) -> None:
        """Each has an order of its own, which is not counted."""
        self._is_large = num_sequences >= _MANY_SEQUENCES

    def add(self, num_bytes: int) -> None:
        """Raises ApiError 429 where there is no room for it."""
        self.settle(self._num_bytes + num_bytes)

    def settle(self, num_bytes: int) -> None:
        """From now on it holds so much. Raises ApiError 429 where that is more, and there is no room for it."""
        more_bytes = max(num_bytes - SMALL_BYTES, 0) - max(self._num_bytes - SMALL_BYTES, 0)
        if more_bytes > 0:
            self._memory.take(self._client, more_bytes)
        elif more_bytes:
            self._memory.give_back(self._client, -more_bytes)
        self._num_bytes = num_bytes

    def __enter__(self) -> Holding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle(0)
        if self._is_large:
            self._memory.trim_soon()
