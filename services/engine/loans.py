"""Counts the references that callers hold: for a transfer, a lease, a prompt handed off.

With the engine's own they account for every reference that the pool counts (`check_integrity`), and a block given
back twice is noticed at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from services.engine.api import NotLent


class References(Protocol):
    """A pool that counts references on its blocks."""

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Take one more on each."""

    def release(self, block_ids: Sequence[int]) -> None:
        """Give one back on each."""


class Loans:
    """Counts references; who holds them is the callers' affair."""

    def __init__(self, pool: References) -> None:
        self._pool = pool
        self._lent: Counter[int] = Counter()

    @property
    def num_blocks(self) -> int:
        """Blocks to which callers hold at least one reference."""
        return len(self._lent)

    def references(self) -> Counter[int]:
        """Number of lent references by block id; the caller's own copy."""
        return Counter(self._lent)

    def lend(self, block_ids: Sequence[int]) -> None:
        """Take one more reference on each block, for the caller."""
        self._pool.acquire(block_ids)
        self._lent.update(block_ids)

    def pass_over(self, block_ids: Sequence[int]) -> None:
        """Make references that a request holds the caller's."""
        self._lent.update(block_ids)

    def check(self, block_ids: Sequence[int]) -> None:
        """Raise `NotLent` for a block that the caller does not hold."""
        wrong = [block_id for block_id, count in Counter(block_ids).items() if self._lent[block_id] < count]
        if wrong:
            raise NotLent(f"blocks {sorted(wrong)} are not lent: given back twice, or never lent")

    def take_over(self, block_ids: Sequence[int]) -> None:
        """Make the caller's references a request's. Raises `NotLent`, changing nothing, if it does not hold them."""
        self.check(block_ids)
        for block_id in block_ids:
            self._lent[block_id] -= 1
            if not self._lent[block_id]:
                del self._lent[block_id]

    def release(self, block_ids: Sequence[int]) -> None:
        """Free the caller's references. Raises `NotLent`, changing nothing, if it does not hold them."""
        self.take_over(block_ids)
        self._pool.release(block_ids)
