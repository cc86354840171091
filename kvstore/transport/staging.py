"""Keeps the buffers through which blocks in pieces are sent and received: a message is one run of bytes.

A block travels as its pieces one behind the other, whatever pieces it has at the other end. Late bytes land in a buffer
that is nobody's by then, and never in a block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import numpy as np

from kvstore.block import BlockMemory, Staging
from kvstore.transport.marks import Marked, mark_run, num_left

_MAX_BYTES: Final = 16 * 1024 * 1024
_MAX_STEP_BYTES: Final = 512 * 1024  # the loop stands still for so much at a time: some 100 us


class Buffers:
    """A transport's, of so many blocks each. They are used again: new memory costs a page fault for each 4 KiB."""

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory
        self._kept: dict[int, list[Staging]] = {}  # by number of blocks
        self._num_kept_bytes = 0

    def take(self, num_blocks: int) -> Staging:
        """Return a buffer for so many blocks, with anything in it."""
        kept = self._kept.get(num_blocks)
        if not kept:
            return self._memory.staging(num_blocks)
        self._num_kept_bytes -= num_blocks * self._memory.block_bytes
        return kept.pop()

    def give_back(self, num_blocks: int, buffer: Staging) -> None:
        """Keep a buffer that nothing touches any more; others go where there would be too many."""
        num_bytes = num_blocks * self._memory.block_bytes
        if self._num_kept_bytes + num_bytes > _MAX_BYTES:
            self._kept.clear()
            self._num_kept_bytes = 0
        self._kept.setdefault(num_blocks, []).append(buffer)
        self._num_kept_bytes += num_bytes

    async def gather(self, first_block: int, num_blocks: int) -> Staging:
        """Return neighbouring blocks one behind the other, as a copy."""
        buffer = self.take(num_blocks)
        await self._step_by_step(self._memory.gather, first_block, num_blocks, buffer)
        return buffer

    async def scatter(self, first_block: int, num_blocks: int, buffer: Staging) -> None:
        """Write neighbouring blocks from a buffer."""
        await self._step_by_step(self._memory.scatter, first_block, num_blocks, buffer)

    async def _step_by_step(
        self, copy: Callable[[int, Staging], None], first_block: int, num_blocks: int, buffer: Staging
    ) -> None:
        """Copy, and let others have the loop now and then."""
        block_bytes = self._memory.block_bytes
        step = max(1, _MAX_STEP_BYTES // block_bytes)
        for start in range(0, num_blocks, step):
            if start:
                await asyncio.sleep(0)
            end = min(start + step, num_blocks)
            copy(first_block + start, buffer[start * block_bytes : end * block_bytes])


class Arrivals:
    """Counts what comes into buffers, by every 64 KiB: the blocks show nothing until a whole message is there."""

    def __init__(self) -> None:
        self._coming: dict[int, Marked] = {}  # by tag
        self._num_before = 0

    @property
    def num_come(self) -> int:
        """What has come so far; never less than before."""
        return self._num_before + sum(_num_marks(marked) - num_left(marked) for marked in self._coming.values())

    def begin(self, tag: int, buffer: Staging) -> None:
        """Watch a buffer from now on. On a device none can be watched; there messages are seen, and no less."""
        self._coming[tag] = mark_run(buffer.view(np.uint64)) if isinstance(buffer, np.ndarray) else []

    def end(self, tag: int) -> None:
        """A message has ended, and counts as come."""
        self._num_before += _num_marks(self._coming.pop(tag))


def _num_marks(marked: Marked) -> int:
    return sum(words.size for words in marked)


class Room:
    """Bounds the bytes in one link's buffers. Each link has its own: those of others might wait for each other."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_reserved_bytes = 0
        self._freed = asyncio.Event()

    async def reserve(self, num_bytes: int) -> None:
        """Wait until there is room. One waits at a time; one always gets it."""
        while self._num_reserved_bytes and self._num_reserved_bytes + num_bytes > self._max_bytes:
            self._freed.clear()
            await self._freed.wait()
        self._num_reserved_bytes += num_bytes

    def free(self, num_bytes: int) -> None:
        """So much is used no more."""
        self._num_reserved_bytes -= num_bytes
        self._freed.set()
