"""Says where the bytes of blocks lie: each block in one piece, or in several of equal size at a constant stride.

    one piece (the native engine, stores)      three pieces (an engine that keeps each layer by itself)
    | block 0 | block 1 | block 2 |            | 0.0 1.0 2.0 | 0.1 1.1 2.1 | 0.2 1.2 2.2 |     block.piece

An engine of several ranks keeps each rank's heads in that rank's memory: as many *regions*, alike but for where they
are, and a block's pieces take turns in them (layer 0 of rank 0, layer 0 of rank 1, layer 1 of rank 0 ..).

Pieces are no matter of what a block *is*: as it travels, and as it is proven, a block is its pieces one behind the
other, and peers may have cut theirs differently. So geometry is no part of the layout; a one-sided transport tells it
to readers, who compute from it which bytes to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_ADDRESSES = 1 << 63


class Region(NamedTuple):
    """One allocation, as the process has it that moves the blocks."""

    address: int
    """Of the first byte of the first block."""
    device_id: int = 0
    """Of a GPU; 0 in main memory."""


@dataclass(frozen=True)
class Geometry:
    """Of R regions, piece `p` of block `b` is `piece_bytes` in region `p % R`, at
    `address + p // R * piece_stride + b * block_stride`.

    All of a region, from the first byte to the last, is one allocation. Construction raises ValueError where pieces
    would overlap, or are no whole number of 8-byte words. `piece_stride` is 0 where a region has one piece of a block.
    """

    regions: tuple[Region, ...]
    num_blocks: int
    num_pieces: int
    piece_bytes: int
    piece_stride: int
    block_stride: int

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.num_pieces, self.piece_bytes) < 1 or self.piece_bytes % 8:
            raise ValueError(f"at least one block, of pieces of a multiple of 8 bytes, expected; got {self}")
        if not self.regions or self.num_pieces % len(self.regions):
            raise ValueError(f"as many pieces in each region expected; got {self}")
        in_region = self.num_pieces // len(self.regions)
        if (in_region == 1) != (self.piece_stride == 0):
            raise ValueError(f"a stride of pieces belongs to several pieces, and to them alone; got {self}")
        one_block = (in_region - 1) * self.piece_stride + self.piece_bytes
        one_piece = (self.num_blocks - 1) * self.block_stride + self.piece_bytes
        by_piece = self.block_stride >= self.piece_bytes and (in_region == 1 or self.piece_stride >= one_piece)
        by_block = self.block_stride >= one_block and (in_region == 1 or self.piece_stride >= self.piece_bytes)
        if not by_piece and not by_block:
            raise ValueError(f"pieces overlap: {self}")
        if any(not 0 <= region.address <= _ADDRESSES - self.span_bytes for region in self.regions):
            raise ValueError(f"no memory is so large: {self}")
        ordered = sorted(self.regions, key=lambda region: (region.device_id, region.address))
        for one, other in itertools.pairwise(ordered):
            if one.device_id == other.device_id and other.address - one.address < self.span_bytes:
                raise ValueError(f"regions overlap: {self}")

    @classmethod
    def of_views(cls, regions: Sequence[Region], shape: Sequence[int], strides: Sequence[int]) -> Geometry:
        """Return that of views which are alike, bytes `(num_blocks, num_layers, piece_bytes)`, one for each region."""
        num_blocks, num_layers, piece_bytes = shape
        block_stride, piece_stride, _ = strides
        return cls(
            tuple(regions),
            num_blocks,
            num_layers * len(regions),
            piece_bytes,
            piece_stride if num_layers > 1 else 0,
            block_stride if num_blocks > 1 else max(block_stride, piece_bytes),
        )

    @property
    def block_bytes(self) -> int:
        """Size of one block, without what lies between its pieces."""
        return self.num_pieces * self.piece_bytes

    @property
    def span_bytes(self) -> int:
        """From the first byte of all blocks to the last, with what lies between them, in each region."""
        last_piece = (self.num_pieces // len(self.regions) - 1) * self.piece_stride
        return last_piece + (self.num_blocks - 1) * self.block_stride + self.piece_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether neighbouring blocks are one run of bytes."""
        return self.num_pieces == 1 and self.block_stride == self.piece_bytes

    def starts(self, unit_bytes: int) -> list[Region]:
        """Return where each unit of block 0 begins, in the order in which they travel; pieces are whole units."""
        assert self.piece_bytes % unit_bytes == 0
        layers = range(0, self.num_pieces // len(self.regions))
        pieces = [
            (each.address + layer * self.piece_stride, each.device_id) for layer in layers for each in self.regions
        ]
        return [Region(at + offset, where) for at, where in pieces for offset in range(0, self.piece_bytes, unit_bytes)]
