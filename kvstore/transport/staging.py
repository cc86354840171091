"""Keeps the buffers through which blocks in pieces are sent and received: a message is one run of bytes.

A block travels as its pieces one behind the other, whatever pieces it has at the other end. Late bytes land in a buffer
that is nobody's by then, and never in a block.
"""

from __future__ import annotations

import asyncio
from typing import Final

from kvstore.block import BlockMemory

_MAX_BYTES: Final = 16 * 1024 * 1024
# Up to here to copy in the loop is quicker than to hand it to a thread.
_MAX_INLINE_BYTES: Final = 512 * 1024


class Staging:
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

    async def gather(self, first_block: int, num_blocks: int) -> object:
        """Return neighbouring blocks one behind the other, as a copy."""
        buffer = self._memory.staging(num_blocks)
        if self._is_small(num_blocks):
            self._memory.gather(first_block, buffer)
        else:
            await asyncio.to_thread(self._memory.gather, first_block, buffer)
        return buffer

    async def scatter(self, first_block: int, num_blocks: int, buffer: object) -> None:
        """Write neighbouring blocks from a buffer."""
        if self._is_small(num_blocks):
            self._memory.scatter(first_block, buffer)
        else:
            await asyncio.to_thread(self._memory.scatter, first_block, buffer)

    def _is_small(self, num_blocks: int) -> bool:
        return self._memory.device == "cpu" and num_blocks * self._memory.block_bytes <= _MAX_INLINE_BYTES
