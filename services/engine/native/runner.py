"""Runs one batch: prepares blocks, computes, samples. The only part of the engine that makes tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from services.engine.native.attention import ForwardBatch
from services.engine.native.forward_inputs import ForwardInputs
from services.engine.native.sampling import NoToken, Sampler, SamplingRow, position_logprobs
from services.engine.native.scheduling import (
    Batch,
    BlockCopy,
    Request,
    SampledBatch,
    SampledSequence,
    ScheduledSequence,
)
from services.engine.request import PositionLogprobs, SampledToken


class ForwardModel(Protocol):
    """The model, as the runner needs it."""

    @property
    def device(self) -> str:
        """The device of new tensors: "cpu", "cuda:0"."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens that min_tokens forbids, besides the request's stop tokens."""

    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Store keys and values in the cache, return float32 logits `[len(batch.logits_indices), vocab_size]`."""


class Runner(Protocol):
    """Runs a step's batch."""

    def run(self, batch: Batch) -> SampledBatch:
        """Compute the batch's tokens; sample where a sequence asks for it."""


class ModelRunner:
    """Owns the KV cache's content, `[num_blocks, ...]`, but not which block is whose: that is the scheduler's."""

    def __init__(self, model: ForwardModel, kv_cache: Tensor, block_size: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._inputs = ForwardInputs(block_size, model.device)
        self._sampler = Sampler.open(model.eos_token_ids, torch.get_num_threads(), model.device)
        # Kept from step to step, for as long as the scheduler keeps the request.
        self._sampling_rows: WeakKeyDictionary[Request, SamplingRow] = WeakKeyDictionary()

    @torch.inference_mode()
    def run(self, batch: Batch) -> SampledBatch:
        """Compute the batch's tokens; sample where a sequence asks for it."""
        for copy in batch.copies:
            self._copy(copy)
        self._zero(batch.new_block_ids)
        logits_of, indices = _logits_rows(batch.sequences)
        logits = self._model.forward(self._inputs.batch(batch.sequences, indices), self._kv_cache)
        samples = self._sample(batch.sequences, logits, logits_of)
        return SampledBatch(
            tuple(
                self._result(sequence, sampled, _prompt_logprobs(sequence, logits, rows.start))
                for sequence, rows, sampled in zip(batch.sequences, logits_of, samples, strict=True)
            )
        )

    def _result(
        self, sequence: ScheduledSequence, sampled: Sequence[SampledToken | NoToken], prompt: Sequence[PositionLogprobs]
    ) -> SampledSequence:
        """What of the samples stands: up to the first one that is not what was guessed, that one included."""
        tokens: list[SampledToken] = []
        for token in sampled:
            if isinstance(token, NoToken):
                break
            tokens.append(token)
            if len(tokens) <= len(sequence.draft) and token.token_id != sequence.draft[len(tokens) - 1]:
                break
        if any(isinstance(token, NoToken) for token in sampled[len(tokens) :]):
            # What was computed of wrong guesses may be no numbers, which no mask weighs down.
            self._zero_slots(sequence.request.block_table, sequence.start + len(tokens), sequence.end)
        # One that has tokens fails in its next step, where that place comes first.
        first = sampled[0] if sampled and not tokens else None
        return SampledSequence(tuple(tokens), first.reason if isinstance(first, NoToken) else None, tuple(prompt))

    def _zero_slots(self, block_table: Sequence[int], start: int, end: int) -> None:
        for position in range(start, end):
            block = self._kv_cache[block_table[position // self._block_size]]
            block[..., position % self._block_size, :].zero_()

    def _copy(self, copy: BlockCopy) -> None:
        # [num_layers, 2, num_kv_heads, block_size, head_dim]
        source, destination = self._kv_cache[copy.source], self._kv_cache[copy.destination]
        destination[..., : copy.num_tokens, :].copy_(source[..., : copy.num_tokens, :])
        destination[..., copy.num_tokens :, :].zero_()

    def _zero(self, block_ids: Sequence[int]) -> None:
        """Clear blocks, neighbours together. Attention masks what is not written yet, but 0 * NaN is NaN."""
        ordered = sorted(block_ids)
        start = 0
        for end in range(1, len(ordered) + 1):
            if end == len(ordered) or ordered[end] != ordered[end - 1] + 1:
                self._kv_cache[ordered[start] : ordered[end - 1] + 1].zero_()
                start = end

    def _sample(
        self, sequences: Sequence[ScheduledSequence], logits: Tensor, logits_of: Sequence[range]
    ) -> list[list[SampledToken | NoToken]]:
        """Sample after the last token of each sequence that asks for it, and after each of its guesses."""
        results: list[list[SampledToken | NoToken]] = [[] for _ in sequences]
        rows, places, indices = list[SamplingRow](), list[int](), list[int]()
        for i, sequence in enumerate(sequences):
            if sequence.needs_sample:
                own = self._rows_of(sequence)
                rows += own
                indices += [i] * len(own)
                places += logits_of[i][-len(own) :]
        if not rows:
            return results
        chosen = logits if len(places) == logits.shape[0] else logits[places]
        for i, token in zip(indices, self._sampler.sample(chosen, rows), strict=True):
            results[i].append(token)
        return results

    def _rows_of(self, sequence: ScheduledSequence) -> list[SamplingRow]:
        """A row for the token after the newest one, and one after each guess: as if those before it had come true."""
        row = self._sampling_row(sequence.request)
        return [row, *(row.after(sequence.draft[:end]) for end in range(1, len(sequence.draft) + 1))]

    def _sampling_row(self, request: Request) -> SamplingRow:
        row = self._sampling_rows.get(request)
        if row is None:
            row = SamplingRow(request.sampling, request.prompt_token_ids, request.output_token_ids)
            self._sampling_rows[request] = row
        return row


def _logits_rows(sequences: Sequence[ScheduledSequence]) -> tuple[list[range], list[int]]:
    """Finds the wanted logits: per sequence its rows among them, and in all the rows of the batch's token axis.

    A sequence wants those of its prompt logprobs, from its first token on, then that of its last token to sample from,
    with those of its guesses.
    """
    logits_of: list[range] = []
    indices: list[int] = []
    first = 0
    for sequence in sequences:
        begin = len(indices)
        indices += range(first, first + sequence.num_prompt_rows)
        if sequence.needs_sample:
            indices += range(first + sequence.num_known - 1, first + sequence.num_tokens)
        logits_of.append(range(begin, len(indices)))
        first += sequence.num_tokens
    return logits_of, indices


def _prompt_logprobs(sequence: ScheduledSequence, logits: Tensor, first: int) -> tuple[PositionLogprobs, ...]:
    """Logprobs of the prompt tokens after each of this chunk's; the sequence's rows of `logits` begin at `first`."""
    num_rows = sequence.num_prompt_rows
    if num_rows == 0 or sequence.num_prompt_logprobs is None:
        return ()
    following = sequence.request.token_ids[sequence.start + 1 : sequence.start + 1 + num_rows]
    return tuple(position_logprobs(logits[first : first + num_rows], following, sequence.num_prompt_logprobs))
