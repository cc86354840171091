"""Attention in C against a softmax in float64, and against itself: nothing around a token shows in its result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.engine.cpu_kernels import REQUIRED_FLAGS
from services.engine.native.kernels.library import KernelLibrary
from tests.kernels.conftest import RUNNABLE, Libraries
from tests.kernels.paged import LAYER, PagedCase

# Weights and outputs are rounded to bfloat16 (8 bits), of values up to 4.
TOLERANCE = 0.02
RAGGED = [(300, 20), (129, 129), (1, 1), (77, 1), (5, 3), (128, 1), (33, 32)]
# The libraries are built once; nothing in them remembers an example.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 16, 34])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 2), (3, 3), (4, 1)])
def test_attends_as_a_softmax_does(library: KernelLibrary, head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    case = PagedCase(RAGGED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    torch.testing.assert_close(case.attend(library).double(), case.oracle(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("window", [1, 2, 16, 33, 130, 1000])
def test_a_sliding_window_ends_where_it_should(library: KernelLibrary, window: int) -> None:
    case = PagedCase(RAGGED, block_size=32)
    torch.testing.assert_close(case.attend(library, window).double(), case.oracle(window), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 257])
def test_every_remainder_of_a_chunk(library: KernelLibrary, context: int) -> None:
    case = PagedCase([(context, min(context, new)) for new in (1, 11, 12, 65)], block_size=64, head_dim=80)
    torch.testing.assert_close(case.attend(library).double(), case.oracle(), rtol=0, atol=TOLERANCE)


def test_a_nan_among_the_values_stays_one_when_scores_grow_later(library: KernelLibrary) -> None:
    case = PagedCase([(200, 1)])
    for token in range(200):
        block, offset = case.tables[0][token // 16], token % 16
        case.cache[block, LAYER, 0, :, offset] *= 0.01 if token < 150 else 4
        if token == 3:
            case.cache[block, LAYER, 1, 0, offset, 5] = torch.nan
    result = case.attend(library)
    assert result[0, :3, 5].isnan().all(), "the heads that share its KV head"
    assert result[0, 3:].isfinite().all()


@pytest.mark.parametrize("size", [1e5, 1e10])
def test_scores_may_be_large(library: KernelLibrary, size: float) -> None:
    case = PagedCase(RAGGED)
    case.cache[:, :, 0] *= size
    for keys_values in case.keys_values:
        keys_values[0] *= size
    torch.testing.assert_close(case.attend(library).double(), case.oracle(), rtol=0, atol=TOLERANCE)


def test_what_a_row_does_not_see_changes_no_sign_of_a_zero(library: KernelLibrary) -> None:
    alone, among_others = PagedCase([(128, 1)]), PagedCase([(130, 130)])
    for case in (alone, among_others):
        case.q[:] = 0.25
        case.cache[:, :, 0] = 0
        case.cache[:, :, 1] = -(2**-126)
    assert torch.equal(alone.attend(library)[0].view(torch.int16), among_others.attend(library)[127].view(torch.int16))


@SHARED
@given(
    lengths=st.lists(st.integers(1, 290).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), max_size=5),
    window=st.sampled_from([None, 1, 30, 128, 200]),
    block_size=st.sampled_from([16, 32, 64]),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_what_else_is_in_the_batch_where_and_on_how_many_threads_shows_in_no_bit(
    libraries: Libraries,
    lengths: list[tuple[int, int]],
    window: int | None,
    block_size: int,
    num_threads: int,
    seed: int,
) -> None:
    library = libraries("amx-emulated" if seed % 4 == 0 else "portable")
    check_bits(library, lengths, window, block_size, num_threads, seed)


@SHARED
@given(
    lengths=st.lists(st.integers(1, 900).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), max_size=5),
    window=st.sampled_from([None, 1, 30, 128, 200]),
    block_size=st.sampled_from([16, 32, 64]),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", [name for name in RUNNABLE if name in REQUIRED_FLAGS])
def test_nor_on_the_real_instructions(
    libraries: Libraries,
    name: str,
    lengths: list[tuple[int, int]],
    window: int | None,
    block_size: int,
    num_threads: int,
    seed: int,
) -> None:
    check_bits(libraries(name), lengths, window, block_size, num_threads, seed)


def check_bits(
    library: KernelLibrary,
    lengths: list[tuple[int, int]],
    window: int | None,
    block_size: int,
    num_threads: int,
    seed: int,
) -> None:
    """One sequence alone in one piece, and the same at the end of a batch, its last tokens in a piece of their own."""
    subject = (200, 200)
    alone = PagedCase([subject], seed=seed, head_dim=48)
    whole = alone.attend(library, window)
    num_last = 1 + seed % 199
    batch = PagedCase([*lengths, (200, num_last)], block_size=block_size, seed=seed + 1, placement=seed, head_dim=48)
    batch.q[-num_last:] = alone.q[-num_last:]
    for token in range(200):
        block = batch.tables[-1][token // block_size]
        batch.cache[block, 1, :, :, token % block_size] = alone.keys_values[0][:, :, token]
    pieced = batch.attend(library, window, num_threads)[-num_last:]
    assert torch.equal(pieced.view(torch.int16), whole[-num_last:].view(torch.int16))


def test_scores_that_dwarf_the_earlier_ones_leave_no_trace_of_them(library: KernelLibrary) -> None:
    case = PagedCase([(260, 260)], head_dim=32)
    for token in range(128, 260):  # one chunk later every score is thousands larger
        block = case.tables[0][token // 16]
        case.cache[block, 1, 0, :, token % 16] *= 1000
        case.keys_values[0][0, :, token] *= 1000
    torch.testing.assert_close(case.attend(library).double(), case.oracle(), rtol=0, atol=TOLERANCE)
