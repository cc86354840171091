"""Attention over blocks against a dumb oracle: one softmax per query over the keys that it may see."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from services.engine.native.attention.attention import Attention, GatherAttention, group_by_length
from services.engine.native.attention.forward import ForwardBatch
from services.engine.native.attention.int8_rows import dequantized, quantized
from services.engine.native.attention.varlen_attention import VarlenAttention, choose_cuda_attention

NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 16


class Case:
    """A random ragged batch over a cache full of earlier keys and values."""

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],  # per sequence: context length after the step, and new tokens
        *,
        block_size: int = 8,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        num_blocks = sum(-(-context // block_size) for context, _ in lengths) + 3
        blocks = list(range(num_blocks))
        random.Random(seed).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(-(-context // block_size))] for context, _ in lengths]
        self.cache = normal(num_blocks, NUM_LAYERS, 2, NUM_KV_HEADS, block_size, HEAD_DIM)
        num_tokens = sum(new for _, new in lengths)
        self.q = normal(num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM)
        self.k, self.v = normal(num_tokens, NUM_KV_HEADS, HEAD_DIM), normal(num_tokens, NUM_KV_HEADS, HEAD_DIM)
        positions = [list(range(context - new, context)) for context, new in lengths]
        slots = [
            self.tables[b][p // block_size] * block_size + p % block_size
            for b in range(len(lengths))
            for p in positions[b]
        ]
        query_start = [0]
        for _, new in lengths:
            query_start.append(query_start[-1] + new)
        width = max(len(table) for table in self.tables)
        self.batch = ForwardBatch(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.tensor([p for each in positions for p in each], device=device),
            slot_mapping=torch.tensor(slots, device=device),
            query_start=query_start,
            context_lens=[context for context, _ in lengths],
            block_tables=torch.tensor(
                [table + [0] * (width - len(table)) for table in self.tables], dtype=torch.int32, device=device
            ),
            logits_indices=torch.zeros(0, dtype=torch.int64, device=device),
        )

    def run(self, attention: Attention, layer: int = 1) -> Tensor:
        step = attention.begin(self.batch, self.cache)
        step.append(layer, self.k, self.v)
        return step.attend(layer, self.q)

    def oracle(self, window: int | None, layer: int = 1) -> Tensor:
        """Call after `run`, which has stored the new keys and values."""
        rows = []
        for b, context in enumerate(self.batch.context_lens):
            blocks = self.cache[self.tables[b], layer].double()  # [blocks, 2, kv heads, block_size, head_dim]
            keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
            for row in range(self.batch.query_start[b], self.batch.query_start[b + 1]):
                position = int(self.batch.positions[row])
                first = 0 if window is None else max(0, position - window + 1)
                query = self.q[row].double().view(NUM_KV_HEADS, GROUP, HEAD_DIM)
                scores = query @ keys[:, first : position + 1].mT / HEAD_DIM**0.5
                rows.append((scores.softmax(-1) @ values[:, first : position + 1]).flatten(0, 1))
        return torch.stack(rows)


@st.composite
def ragged(draw: st.DrawFn) -> list[tuple[int, int]]:
    contexts = draw(st.lists(st.integers(1, 120), min_size=1, max_size=8))
    return [(context, draw(st.sampled_from(sorted({1, context, 1 + context // 2})))) for context in contexts]


@given(ragged(), st.sampled_from([None, 1, 5, 8, 30]), st.sampled_from([1, 4, 16]), st.integers(0, 1000))
def test_any_ragged_batch_attends_as_the_oracle(
    lengths: list[tuple[int, int]], window: int | None, block_size: int, seed: int
) -> None:
    case = Case(lengths, block_size=block_size, seed=seed)
    ours = case.run(GatherAttention([None, window]))
    torch.testing.assert_close(ours.double(), case.oracle(window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_chunks_longer_than_a_piece_attend_as_the_oracle(window: int | None) -> None:
    case = Case([(700, 600), (513, 513), (300, 1), (290, 257)], block_size=32)
    ours = case.run(GatherAttention([None, window]))
    torch.testing.assert_close(ours.double(), case.oracle(window), rtol=0, atol=1e-5)


def test_masks_grow_and_stay_right() -> None:
    attention = GatherAttention([None, 20])
    for context in (10, 1500, 40, 3000):
        case = Case([(context, min(context, 30))], block_size=32)
        torch.testing.assert_close(case.run(attention).double(), case.oracle(20), rtol=0, atol=1e-5)


def test_append_writes_the_layers_slots_and_nothing_else() -> None:
    case = Case([(20, 5), (9, 9)])
    before = case.cache.clone()
    case.run(GatherAttention([None, None]), layer=1)
    assert torch.equal(case.cache[:, 0], before[:, 0])
    blocks, offsets = case.batch.slot_mapping // 8, case.batch.slot_mapping % 8
    written = case.cache[blocks, 1, :, :, offsets]  # [T, 2, kv heads, head_dim]
    assert torch.equal(written, torch.stack((case.k, case.v), dim=1))
    before[blocks, 1, :, :, offsets] = written
    assert torch.equal(case.cache, before)


def test_a_16_bit_cache_serves_32_bit_queries() -> None:
    case = Case([(50, 20), (33, 1), (64, 1)])
    case.cache = case.cache.to(torch.float16)
    ours = case.run(GatherAttention([None, None]))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), case.oracle(None), rtol=0, atol=1e-5)


@given(ragged(), st.sampled_from([None, 5, 30]), st.integers(0, 1000))
def test_a_cache_in_8_bits_attends_as_the_oracle_over_what_it_stands_for(
    lengths: list[tuple[int, int]], window: int | None, seed: int
) -> None:
    case = Case(lengths, seed=seed)
    earlier = case.cache
    case.cache = quantized(earlier)
    ours = case.run(GatherAttention([None, window]))
    case.cache = dequantized(case.cache, torch.float32)
    torch.testing.assert_close(ours.double(), case.oracle(window), rtol=0, atol=1e-5)


@given(st.lists(st.integers(1, 5000), max_size=60), st.integers(1, 20_000))
def test_groups_partition_the_rows_and_waste_little(lengths: list[int], max_total: int) -> None:
    groups = group_by_length(lengths, max_total)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[i] for i in group]
        assert len(group) == 1 or max(members) * len(group) <= max_total
        assert all(n >= 0.75 * max(members) or n >= max(members) - 4 for n in members)


@pytest.mark.parametrize("window", [None, 12])
def test_the_cuda_path_calls_its_kernel_with_shapes_that_the_kernel_accepts(window: int | None) -> None:
    """There is no kernel on a CPU, but its signature and shape rules can be checked on tensors without data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        case = Case([(40, 17), (9, 1)], dtype=torch.bfloat16)
        attended = case.run(VarlenAttention([None, window]))
    assert attended.shape == case.q.shape
    assert attended.dtype == torch.bfloat16


def test_float32_on_cuda_is_gathered() -> None:
    assert isinstance(choose_cuda_attention([None], torch.zeros(1, 1, 2, 2, 16, 16), 4), GatherAttention)


def test_a_device_without_the_kernel_falls_back_to_gathering(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel refuses CPU tensors as it would refuse a GPU or a block size that it does not know."""
    cache = torch.zeros(1, 1, 2, 2, 16, 16, dtype=torch.bfloat16)
    assert isinstance(choose_cuda_attention([None], cache, 4), GatherAttention)
    assert "FlashAttention refuses this cache" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_attends_as_the_oracle(dtype: torch.dtype, window: int | None) -> None:
    settings: dict[str, Any] = {"block_size": 32, "dtype": dtype, "device": "cuda"}
    case = Case([(200, 100), (77, 77), (300, 1), (33, 1)], **settings)
    chosen = choose_cuda_attention([None, window], case.cache, NUM_KV_HEADS * GROUP)
    for attention in (chosen, GatherAttention([None, window])):
        torch.testing.assert_close(case.run(attention).double(), case.oracle(window), rtol=0, atol=2e-2)
