"""What the model reads of a step is the same whatever steps came before."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from services.engine.api import SamplingParams
from services.engine.native.attention import ForwardBatch
from services.engine.native.forward_inputs import ForwardInputs
from services.engine.native.scheduling import Request, ScheduledSequence

BLOCK_SIZE = 4


def request(chooser: random.Random, name: str, num_prompt_tokens: int) -> Request:
    prompt = [chooser.randrange(1000) for _ in range(num_prompt_tokens)]
    made = Request(name, prompt, SamplingParams())
    made.block_table = chooser.sample(range(1, 500), -(-num_prompt_tokens // BLOCK_SIZE))
    return made


def scheduled(request: Request, num_tokens: int) -> ScheduledSequence:
    start = request.num_computed_tokens
    return ScheduledSequence(request, start, num_tokens, False, start + num_tokens == request.num_tokens, None)


def check(batch: ForwardBatch, sequences: Sequence[ScheduledSequence]) -> None:
    """Against the batch's own definition, token by token."""
    positions, token_ids, slots = [], [], []
    for b, (asked, start, num_tokens, *_) in enumerate(sequences):
        assert list(range(batch.query_start[b], batch.query_start[b + 1])) == list(
            range(len(positions), len(positions) + num_tokens)
        )
        assert batch.context_lens[b] == start + num_tokens
        num_blocks = -(-(start + num_tokens) // BLOCK_SIZE)
        assert batch.block_tables[b, :num_blocks].tolist() == asked.block_table[:num_blocks]
        rest = batch.block_tables[b, num_blocks:].tolist()
        assert rest == (asked.block_table[num_blocks:] + [0] * len(rest))[: len(rest)]
        for position in range(start, start + num_tokens):
            positions.append(position)
            token_ids.append(asked.token_ids[position])
            slots.append(asked.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    assert batch.positions.tolist() == positions
    assert batch.token_ids.tolist() == token_ids
    assert batch.slot_mapping.tolist() == slots
    assert batch.block_tables.dtype == torch.int32
    assert max(batch.context_lens) <= batch.block_tables.shape[1] * BLOCK_SIZE


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_is_right_after_any_steps_before_it(seed: int) -> None:
    chooser = random.Random(seed)
    inputs = ForwardInputs(BLOCK_SIZE, "cpu")
    live: list[Request] = []
    for step in range(60):
        for _ in range(chooser.choice([0, 0, 1, 2])):
            live.append(request(chooser, f"r{step}", chooser.choice([1, 3, 9, 40])))
        for gone in [each for each in live if chooser.random() < 0.05]:
            live.remove(gone)
        for preempted in [each for each in live if chooser.random() < 0.03]:
            preempted.block_table = chooser.sample(range(1, 500), -(-preempted.num_tokens // BLOCK_SIZE))
            preempted.num_computed_tokens = 0
        sequences = []
        for each in live:
            if chooser.random() < 0.9:
                left = each.num_tokens - each.num_computed_tokens
                sequences.append(scheduled(each, min(left, chooser.choice([1, 2, 7, 50]))))
        if not sequences:
            continue
        chooser.shuffle(sequences) if chooser.random() < 0.1 else None
        check(inputs.batch(sequences, [0]), sequences)
        for each, _, num_tokens, *_ in sequences:
            each.num_computed_tokens += num_tokens
            if each.num_computed_tokens == each.num_tokens:
                each.append_output(chooser.randrange(1000))
                if each.num_tokens > len(each.block_table) * BLOCK_SIZE:
                    each.block_table += [chooser.randrange(1, 500)]
