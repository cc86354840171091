"""Says where the bytes of blocks lie: each block in one piece, or in several of equal size at a constant stride.

    one piece (the native engine, stores)      three pieces (an engine that keeps each layer by itself)
    | block 0 | block 1 | block 2 |            | 0.0 1.0 2.0 | 0.1 1.1 2.1 | 0.2 1.2 2.2 |     block.piece

Pieces are no matter of what a block *is*: as it travels, and as it is proven, a block is its pieces one behind the
other, and peers may have cut theirs differently. So geometry is no part of the layout; a one-sided transport tells it
to readers, who compute from it which bytes to read.
"""

from __future__ import annotations

from dataclasses import dataclass

_ADDRESSES = 1 << 63


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

    def starts(self, unit_bytes: int) -> list[int]:
        """Return where each unit of block 0 begins, in the order in which they travel; pieces are whole units."""
        assert self.piece_bytes % unit_bytes == 0
        pieces = [self.address + piece * self.piece_stride for piece in range(self.num_pieces)]
        return [piece + offset for piece in pieces for offset in range(0, self.piece_bytes, unit_bytes)]
