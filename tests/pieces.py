"""Pools in pieces as engines have them, and the same blocks one behind the other."""

from __future__ import annotations

import numpy as np

from kvstore.block import HostMemory, PieceMemory

GAP_BYTES = 64


def piece_memory(num_pieces: int, num_blocks: int, block_bytes: int, has_gaps: bool = False) -> PieceMemory:
    """A zeroed pool, all first pieces one behind the other, then all second ones; with gaps: none has a neighbour."""
    piece_bytes, gap_bytes = block_bytes // num_pieces, GAP_BYTES if has_gaps else 0
    assert piece_bytes * num_pieces == block_bytes
    array = np.zeros((num_pieces, num_blocks, piece_bytes + gap_bytes), np.uint8)
    return PieceMemory(array[:, :, :piece_bytes])


def host_memory(num_pieces: int, num_blocks: int, block_bytes: int) -> HostMemory | PieceMemory:
    """A zeroed pool; of one piece, as stores and the native engine have it."""
    if num_pieces == 1:
        return HostMemory.allocate(num_blocks, block_bytes)
    return piece_memory(num_pieces, num_blocks, block_bytes)


def write_all(memory: HostMemory | PieceMemory, blocks: np.ndarray) -> None:
    """Fill a pool by `(num_blocks, block_bytes)`."""
    memory.scatter(0, np.ascontiguousarray(blocks, np.uint8).reshape(-1))


def read_all(memory: HostMemory | PieceMemory) -> np.ndarray:
    """Return all blocks, each one run of bytes: `(num_blocks, block_bytes)`."""
    staging = memory.staging(memory.num_blocks)
    memory.gather(0, staging)
    return staging.reshape(memory.num_blocks, memory.block_bytes)
