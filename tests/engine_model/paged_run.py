"""Drives a model over a paged cache the way an engine does: blocks in a shuffled order, sequences in chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.engine.native.attention.forward import ForwardBatch
from services.engine.native.model.model import LoadedModel


@dataclass
class Sequenced:
    """One sequence's blocks and how many of its tokens are in the cache."""

    block_table: list[int] = field(default_factory=list)
    num_cached: int = 0


class PagedRun:
    """A cache whose blocks are handed out in random order; block 0 is used like any other."""

    def __init__(self, model: LoadedModel, *, num_blocks: int = 160, block_size: int = 16, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        self.kv_cache = model.new_kv_cache(num_blocks, block_size)
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def batch(self, work: Sequence[tuple[Sequenced, Sequence[int]]], *, all_logits: bool = True) -> ForwardBatch:
        """Append tokens to sequences; asks for the logits of all rows, or of each sequence's last."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        for sequence, new in work:
            for position in range(sequence.num_cached, sequence.num_cached + len(new)):
                if position // self.block_size == len(sequence.block_table):
                    sequence.block_table.append(self._free.pop())
                positions.append(position)
                slots.append(sequence.block_table[position // self.block_size] * self.block_size)
                slots[-1] += position % self.block_size
            tokens += new
            query_start.append(len(tokens))
            sequence.num_cached += len(new)
        width = max(len(sequence.block_table) for sequence, _ in work)
        tables = [sequence.block_table + [0] * (width - len(sequence.block_table)) for sequence, _ in work]
        rows = range(len(tokens)) if all_logits else [stop - 1 for stop in query_start[1:]]
        return ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=query_start,
            context_lens=[sequence.num_cached for sequence, _ in work],
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logits_indices=torch.tensor(list(rows), dtype=torch.int64),
        )

    def step(self, work: Sequence[tuple[Sequenced, Sequence[int]]]) -> list[Tensor]:
        """Run one step; return the logits of each sequence's new tokens."""
        batch = self.batch(work)
        logits = self.model.forward(batch, self.kv_cache)
        return [logits[a:b] for a, b in zip(batch.query_start, batch.query_start[1:], strict=False)]

    def whole(self, token_ids: Sequence[int], *, chunk: int | None = None) -> Tensor:
        """Return the logits of a new sequence, computed `chunk` tokens at a time."""
        sequence = Sequenced()
        chunk = chunk or len(token_ids)
        pieces = [token_ids[start : start + chunk] for start in range(0, len(token_ids), chunk)]
        return torch.cat([self.step([(sequence, piece)])[0] for piece in pieces])
