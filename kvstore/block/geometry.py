"""Says where the bytes of blocks lie: each block in one piece, or in several of equal size at a constant stride.

    one piece (the native engine, stores)      three pieces (an engine that keeps each layer by itself)
    | block 0 | block 1 | block 2 |            | 0.0 1.0 2.0 | 0.1 1.1 2.1 | 0.2 1.2 2.2 |     block.piece

Pieces are no matter of what a block *is*: as it travels, and as it is proven, a block is its pieces one behind the
other, and peers may have cut theirs differently. So geometry is no part of the layout; a one-sided transport tells it
to readers, who compute from it which bytes to read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.block.runs import Run

_ADDRESSES = 1 << 63

Spans = npt.NDArray[np.uint64]
"""`(num_spans, 2)`: address and length of each."""


@dataclass(frozen=True)
class Geometry:
    """Piece `p` of block `b` is `piece_bytes` at `address + p * piece_stride + b * block_stride`.

    All of it, from the first byte to the last, is one allocation of its process. Construction raises ValueError where
    pieces would overlap, or are no whole number of 8-byte words. `piece_stride` is 0 where there is one piece.
    """

    address: int
    num_blocks: int
    num_pieces: int
    piece_bytes: int
    piece_stride: int
    block_stride: int

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.num_pieces, self.piece_bytes) < 1 or self.piece_bytes % 8 or self.address < 0:
            raise ValueError(f"at least one block, of pieces of a multiple of 8 bytes, expected; got {self}")
        if (self.num_pieces == 1) != (self.piece_stride == 0):
            raise ValueError(f"a stride of pieces belongs to several pieces, and to them alone; got {self}")
        one_block = (self.num_pieces - 1) * self.piece_stride + self.piece_bytes
        one_piece = (self.num_blocks - 1) * self.block_stride + self.piece_bytes
        by_piece = self.block_stride >= self.piece_bytes and (self.num_pieces == 1 or self.piece_stride >= one_piece)
        by_block = self.block_stride >= one_block and (self.num_pieces == 1 or self.piece_stride >= self.piece_bytes)
        if not by_piece and not by_block:
            raise ValueError(f"pieces overlap: {self}")
        if self.address + self.span_bytes > _ADDRESSES:
            raise ValueError(f"no memory is so large: {self}")

    @classmethod
    def contiguous(cls, address: int, num_blocks: int, block_bytes: int) -> Geometry:
        """Blocks of one piece, one behind the other."""
        return cls(address, num_blocks, 1, block_bytes, 0, block_bytes)

    @property
    def block_bytes(self) -> int:
        """Size of one block, without what lies between its pieces."""
        return self.num_pieces * self.piece_bytes

    @property
    def span_bytes(self) -> int:
        """From the first byte of all blocks to the last, with what lies between them."""
        return (self.num_pieces - 1) * self.piece_stride + (self.num_blocks - 1) * self.block_stride + self.piece_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether neighbouring blocks are one run of bytes."""
        return self.num_pieces == 1 and self.block_stride == self.piece_bytes


def pair_spans(remote: Geometry, local: Geometry, runs: Sequence[Run]) -> tuple[Spans, Spans]:
    """Return which spans of an owner's memory go to which of ours, pair by pair of equal length, for blocks of a read.

    Pieces that are cut differently are cut to what fits both; neighbours that are so at both ends are one span. Piece
    by piece, and within each in the order of the runs. Raises ValueError for blocks of unequal size, IndexError for
    such as are not there.
    """
    if remote.block_bytes != local.block_bytes:
        raise ValueError(f"blocks of {remote.block_bytes} bytes, ours have {local.block_bytes}")
    for run in runs:
        for geometry, first in ((remote, run.remote_first), (local, run.local_first)):
            if run.num_blocks < 1 or not 0 <= first <= geometry.num_blocks - run.num_blocks:
                raise IndexError(f"{run} is not in a pool of {geometry.num_blocks} blocks")
    unit_bytes = math.gcd(remote.piece_bytes, local.piece_bytes)
    # A run is one span of each unit where its blocks' units are neighbours in both memories, else one for each block.
    if not unit_bytes == remote.block_stride == local.block_stride:
        runs = [Run(run.remote_first + i, run.local_first + i, 1) for run in runs for i in range(run.num_blocks)]
    counts = np.array([run.num_blocks for run in runs], np.uint64)
    firsts = (np.array([run.remote_first for run in runs]), np.array([run.local_first for run in runs]))
    lengths = np.tile(counts * np.uint64(unit_bytes), local.block_bytes // unit_bytes)
    sources, targets = (_starts(*of, unit_bytes) for of in zip((remote, local), firsts, strict=True))
    return np.stack([sources, lengths], axis=1), np.stack([targets, lengths], axis=1)


def _starts(geometry: Geometry, firsts: npt.NDArray[np.int64], unit_bytes: int) -> npt.NDArray[np.uint64]:
    """Where each unit of these blocks begins: unit by unit."""
    units = np.arange(geometry.block_bytes // unit_bytes, dtype=np.uint64) * np.uint64(unit_bytes)
    piece_bytes = np.uint64(geometry.piece_bytes)
    of_units = np.uint64(geometry.address) + units // piece_bytes * np.uint64(geometry.piece_stride)
    of_units += units % piece_bytes
    of_blocks = firsts.astype(np.uint64) * np.uint64(geometry.block_stride)
    starts: npt.NDArray[np.uint64] = (of_units[:, None] + of_blocks[None, :]).reshape(-1)
    return starts
