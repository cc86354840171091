"""Bounds how many unchanged blocks a store drops since readers doubt them. Pure; the clock is passed in.

Readers check proofs, and a store, which has no key, must take their word. Any peer can give it. So a liar empties a
store no faster than this; and wrong blocks beyond it stay a while, for readers to pass over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

MOST_AT_ONCE: Final = 256
PER_S: Final = 4.0


class Doubts:
    """A bucket of blocks that may be dropped, for all readers together: who lies takes many names."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = float(MOST_AT_ONCE)
        self._at_s = clock()

    def take(self, num_blocks: int) -> int:
        """How many of these may be dropped now."""
        now_s = self._clock()
        self._left = min(self._left + (now_s - self._at_s) * PER_S, MOST_AT_ONCE)
        self._at_s = now_s
        num_taken = min(num_blocks, int(self._left))
        self._left -= num_taken
        return num_taken
