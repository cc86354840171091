"""Shows an engine's KV cache to the block store: blocks of bytes, summed where they are, in one piece or in several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.block import ROW_WORDS, BlockMemory, Geometry, Multipliers, PieceMemory, Staging

_LOWER_HALF = (1 << 32) - 1
_BLOCKS_AT_ONCE = 16  # bounds what summing allocates on the device


def tensor_memory(pieces: Tensor) -> BlockMemory:
    """Return a view of a cache, uint8 `[num_pieces, num_blocks, piece_bytes]`, as memory that transports can use.

    Without a copy; the cache's owner keeps it alive. Raises ValueError where it cannot be that.
    """
    return PieceMemory(pieces.numpy()) if pieces.device.type == "cpu" else DeviceMemory(pieces)


class DeviceMemory:
    """A pool in a GPU's memory (or anywhere that torch has int64 arithmetic). Keeps the cache alive."""

    def __init__(self, pieces: Tensor) -> None:
        """`pieces`: uint8 `[num_pieces, num_blocks, piece_bytes]`, any strides but the last one's, which is 1."""
        if pieces.dtype != torch.uint8 or pieces.dim() != 3 or pieces.stride(2) != 1:
            raise ValueError(
                f"expected uint8 [num_pieces, num_blocks, piece_bytes], got {pieces.dtype} {list(pieces.shape)}"
            )
        num_pieces, num_blocks, piece_bytes = pieces.shape
        piece_stride, block_stride, _ = pieces.stride()
        self.geometry = Geometry(
            pieces.data_ptr(),
            num_blocks,
            num_pieces,
            piece_bytes,
            piece_stride if num_pieces > 1 else 0,
            block_stride if num_blocks > 1 else max(block_stride, piece_bytes),
        )
        self._blocks = pieces.transpose(0, 1)
        self._words = self._blocks.view(torch.int64)
        self._tables: dict[Multipliers, tuple[Tensor, Tensor]] = {}

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.geometry.num_blocks

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        return self.geometry.block_bytes

    @property
    def device(self) -> str:
        """`"cuda:N"`."""
        return str(self._blocks.device)

    def view(self, block_id: int) -> Tensor:
        """Return block `block_id` as uint8 `[num_pieces, piece_bytes]`; writing to it writes the pool."""
        self._check(block_id)
        return self._blocks[block_id]

    def sums(self, block_ids: Sequence[int], multipliers: Multipliers) -> list[bytes]:
        """Return the sums of each block's rows, the bytes that `Multipliers.sums` gives on a CPU. Raises IndexError.

        Waits for the device: whatever was launched on the current stream before is included.
        """
        for block_id in block_ids:
            self._check(block_id)
        even, odd = self._on_device(multipliers)
        num_words = self.block_bytes // 8
        num_whole = num_words // ROW_WORDS * ROW_WORDS
        sums: list[bytes] = []
        for start in range(0, len(block_ids), _BLOCKS_AT_ONCE):
            chosen = torch.tensor(block_ids[start : start + _BLOCKS_AT_ONCE], device=self._words.device)
            words = self._words[chosen].reshape(len(chosen), num_words)
            parts = [words[:, :num_whole].reshape(len(words), -1, ROW_WORDS)] if num_whole else []
            parts += [words[:, None, num_whole:]] if num_whole < num_words else []
            rows = torch.cat([_sum_rows(part, even, odd) for part in parts], dim=1)
            sums += [row.tobytes() for row in rows.cpu().numpy()]
        return sums

    def staging(self, num_blocks: int) -> Tensor:
        """Return a new buffer, uint8 `[num_blocks * block_bytes]`, which has `__cuda_array_interface__`."""
        return torch.empty(num_blocks * self.block_bytes, dtype=torch.uint8, device=self._blocks.device)

    def gather(self, first_block: int, staging: Staging) -> None:
        """Fill a buffer with neighbouring blocks. Waits for the device. Raises IndexError."""
        blocks, buffer = self._pair(first_block, staging)
        buffer.copy_(blocks)
        self._wait()

    def scatter(self, first_block: int, staging: Staging) -> None:
        """Write neighbouring blocks from a buffer. Waits for the device. Raises IndexError."""
        blocks, buffer = self._pair(first_block, staging)
        blocks.copy_(buffer)
        self._wait()

    def _pair(self, first_block: int, staging: Staging) -> tuple[Tensor, Tensor]:
        assert isinstance(staging, Tensor)
        buffer = staging.view(-1, *self._blocks.shape[1:])
        self._check(first_block)
        self._check(first_block + len(buffer) - 1)
        return self._blocks[first_block : first_block + len(buffer)], buffer

    def _wait(self) -> None:
        if self._blocks.is_cuda:
            torch.cuda.current_stream(self._blocks.device).synchronize()  # no stream of UCX's knows of ours

    def _on_device(self, multipliers: Multipliers) -> tuple[Tensor, Tensor]:
        if multipliers not in self._tables:
            tables = (torch.from_numpy(table.view(np.int64).copy()) for table in (multipliers.even, multipliers.odd))
            even, odd = (table.to(self._words.device) for table in tables)
            self._tables[multipliers] = even, odd
        return self._tables[multipliers]

    def _check(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside this pool of {self.num_blocks}")


def _sum_rows(words: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Sum rows `[.., num_rows, num_words]`: `[.., num_rows, 2]`. int64 wraps around, which is modulo 2**64."""
    size = words.shape[-1]
    lower, upper = words & _LOWER_HALF, (words >> 32) & _LOWER_HALF
    first = (lower * even[:size] + upper * odd[:size]).sum(dim=-1)
    second = (lower * odd[:size] + upper * even[1 : size + 1]).sum(dim=-1)
    return torch.stack([first, second], dim=-1)
