"""Keeps the buffers through which blocks in pieces are sent and received: a message is one run of bytes.

A block travels as its pieces one behind the other, whatever pieces it has at the other end. Late bytes land in a buffer
that is nobody's by then, and never in a block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from kvstore.block import BlockMemory, Staging

_MAX_BYTES: Final = 16 * 1024 * 1024
_MAX_STEP_BYTES: Final = 512 * 1024  # the loop stands still for so much at a time: some 100 us


class StagingRoom:
    """The buffers of one link, bounded in bytes. A link has its own: those of others might wait for each other."""

    def __init__(self, memory: BlockMemory, max_bytes: int = _MAX_BYTES) -> None:
        self._memory = memory
        self._max_bytes = max_bytes
        self._num_reserved_bytes = 0
        self._freed = asyncio.Event()

    async def reserve(self, num_blocks: int) -> None:
        """Wait until there is room for so many blocks. One waits at a time; one always gets it."""
        num_bytes = num_blocks * self._memory.block_bytes
        while self._num_reserved_bytes and self._num_reserved_bytes + num_bytes > self._max_bytes:
            self._freed.clear()
            await self._freed.wait()
        self._num_reserved_bytes += num_bytes

    def free(self, num_blocks: int) -> None:
        """So many blocks' room is used no more."""
        self._num_reserved_bytes -= num_blocks * self._memory.block_bytes
        self._freed.set()

    async def gather(self, first_block: int, num_blocks: int) -> Staging:
        """Return neighbouring blocks one behind the other, as a copy."""
        buffer = self._memory.staging(num_blocks)
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
