"""Puts a step's sequences into the arrays that the model reads.

Block tables stay from step to step: a decode step adds a block to few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from services.engine.native.attention import ForwardBatch
from services.engine.native.scheduling import ScheduledSequence


class ForwardInputs:
    """Makes the batches of one runner. A batch's tables are this object's, and good until the next one is made."""

    def __init__(self, block_size: int, device: str) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = np.zeros((0, 0), dtype=np.int32)
        # What each row of the tables has: the first so many blocks of that very list, which only grows.
        self._rows: list[tuple[list[int], int]] = []

    def batch(self, sequences: Sequence[ScheduledSequence], logits_indices: Sequence[int]) -> ForwardBatch:
        """Return the forward pass over these sequences, with the logits of those rows of its token axis."""
        starts = np.array([sequence.start for sequence in sequences], dtype=np.int64)
        ends = [sequence.end for sequence in sequences]
        max_blocks = -(-max(ends) // self._block_size)
        self._update_tables(sequences, max_blocks)
        if len(sequences) == sum(sequence.num_tokens for sequence in sequences):
            rows, positions, query_start = np.arange(len(sequences)), starts, list(range(len(sequences) + 1))
            token_ids = [sequence.request.token_ids[sequence.start] for sequence in sequences]
        else:
            counts = np.array([sequence.num_tokens for sequence in sequences], dtype=np.int64)
            first_rows = np.concatenate(([0], counts.cumsum()))
            query_start = first_rows.tolist()
            rows = np.repeat(np.arange(len(sequences)), counts)
            positions = np.arange(query_start[-1]) + np.repeat(starts - first_rows[:-1], counts)
            token_ids = list(chain.from_iterable(sequence.token_ids for sequence in sequences))
        blocks, offsets = np.divmod(positions, self._block_size)
        slots = self._tables[rows, blocks].astype(np.int64) * self._block_size + offsets
        return ForwardBatch(
            token_ids=self._tensor(np.array(token_ids, dtype=np.int64)),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slots),
            query_start=query_start,
            context_lens=ends,
            block_tables=self._tensor(self._tables[: len(sequences), :max_blocks]),
            logits_indices=self._tensor(np.array(logits_indices, dtype=np.int64)),
        )

    def _tensor(self, array: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device == "cpu" else tensor.to(self._device)

    def _update_tables(self, sequences: Sequence[ScheduledSequence], max_blocks: int) -> None:
        num_rows, width = self._tables.shape
        if len(sequences) > num_rows or max_blocks > width:
            self._tables = np.zeros((max(2 * len(sequences), num_rows), max(2 * max_blocks, width)), dtype=np.int32)
            self._rows = []
        for i, sequence in enumerate(sequences):
            table = sequence.request.block_table
            has, num_there = self._rows[i] if i < len(self._rows) else ([], 0)
            if has is not table:
                self._tables[i] = 0
                num_there = 0
            elif num_there == len(table):
                continue
            # A prompt has the blocks of all its tokens at once: some are beyond this step's.
            num_blocks = min(len(table), self._tables.shape[1])
            self._tables[i, num_there:num_blocks] = table[num_there:num_blocks]
            self._rows[i : i + 1] = [(table, num_blocks)]
