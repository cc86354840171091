"""Describes one forward pass: a ragged batch of prefill chunks and decode tokens, on one path."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """B sequences, at least one, with T new tokens in all, laid end to end.

    Sequence b owns rows `query_start[b] : query_start[b + 1]` of the token axis, which are the last tokens of its
    context:

        |<------------------ context_lens[b] ------------------>|
        |  in the cache before this step  |  this step's tokens |
        |                                 |<-- num_queries(b) ->|
        ^ position 0                      ^ positions[query_start[b]]

    Position p of sequence b lives in block `block_tables[b, p // block_size]` at offset `p % block_size`; for this
    step's tokens `slot_mapping` says the same as `block_id * block_size + offset`. Tensors are on the model's device.

    Whoever hands out blocks zeroes them first: attention masks what lies beyond a context's end, but 0 * NaN is NaN.
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T]
    query_start: list[int]  # [B + 1], prefix sums of tokens per sequence
    context_lens: list[int]  # [B], tokens in the cache after this step
    block_tables: Tensor  # int32 [B, max_blocks]; beyond a context's end later blocks of its own, or 0
    logits_indices: Tensor  # int64 [n], rows of T whose logits are wanted, ascending

    def __post_init__(self) -> None:
        num_tokens, num_sequences = self.token_ids.shape[0], len(self.context_lens)
        assert self.positions.shape[0] == self.slot_mapping.shape[0] == num_tokens, "token axis"
        assert len(self.query_start) == self.block_tables.shape[0] + 1 == num_sequences + 1, "sequence axis"
        assert num_sequences > 0, "an empty batch computes nothing"
        assert self.query_start[0] == 0, "the first sequence starts at row 0"
        assert self.query_start[-1] == num_tokens, "query_start must cover all tokens"
        assert all(0 < self.num_queries(b) <= self.context_lens[b] for b in range(num_sequences)), "sequence lengths"

    def num_queries(self, b: int) -> int:
        """Return the number of tokens that sequence `b` has in this step."""
        return self.query_start[b + 1] - self.query_start[b]
