"""Pools in pieces as engines have them, and the same blocks one behind the other."""

from __future__ import annotations

import numpy as np

from kvstore.block import HostMemory, PieceMemory

GAP_BYTES = 64


def piece_memory(
    num_pieces: int, num_blocks: int, block_bytes: int, has_gaps: bool = False, num_regions: int = 1
) -> PieceMemory:
    """A zeroed pool, all first pieces one behind the other, then all second ones; with gaps: none has a neighbour.

    With regions: as an engine's ranks have them.
    """
    piece_bytes, gap_bytes = block_bytes // num_pieces, GAP_BYTES if has_gaps else 0
    assert piece_bytes * num_pieces == block_bytes
    shape = (num_pieces // num_regions, num_blocks, piece_bytes + gap_bytes)
    return PieceMemory(*(np.zeros(shape, np.uint8)[:, :, :piece_bytes] for _ in range(num_regions)))


def host_memory(num_pieces: int, num_blocks: int, block_bytes: int) -> HostMemory | PieceMemory:
    """A zeroed pool; of one piece, as stores and the native engine have it; of 8, 16 .. in the regions of two ranks."""
    if num_pieces == 1:
        return HostMemory.allocate(num_blocks, block_bytes)
    return piece_memory(num_pieces, num_blocks, block_bytes, num_regions=2 if num_pieces % 8 == 0 else 1)


def read_block(memory: HostMemory | PieceMemory, block_id: int) -> bytes:
    """Return a block as it travels."""
    staging = memory.staging(1)
    memory.gather(block_id, staging)
    return staging.tobytes()


def write_block(memory: HostMemory | PieceMemory, block_id: int, content: bytes | bytearray) -> None:
    """Write a block as it travels."""
    memory.scatter(block_id, np.frombuffer(content, np.uint8))


def flip(memory: HostMemory | PieceMemory, block_id: int, byte: int, bit: int = 0) -> None:
    """Change a bit of a block."""
    content = bytearray(read_block(memory, block_id))
    content[byte] ^= 1 << bit
    write_block(memory, block_id, content)


def write_all(memory: HostMemory | PieceMemory, blocks: np.ndarray) -> None:
    """Fill a pool by `(num_blocks, block_bytes)`."""
    memory.scatter(0, np.ascontiguousarray(blocks, np.uint8).reshape(-1))


def read_all(memory: HostMemory | PieceMemory) -> np.ndarray:
    """Return all blocks, each one run of bytes: `(num_blocks, block_bytes)`."""
    staging = memory.staging(memory.num_blocks)
    memory.gather(0, staging)
    return staging.reshape(memory.num_blocks, memory.block_bytes)
