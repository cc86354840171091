"""Attention in C against a softmax in float64, and against itself: nothing around a token shows in its result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.engine.cpu_kernels import REQUIRED_FLAGS
from services.engine.native.attention.int8_rows import quantized
from services.engine.native.kernels.library import KernelLibrary
from tests.kernels.conftest import RUNNABLE, Libraries
from tests.kernels.paged import LAYER, PagedCase

# Weights and outputs are rounded to bfloat16 (8 bits), of values up to 4.
TOLERANCE = 0.02
RAGGED = [(300, 20), (129, 129), (1, 1), (77, 1), (5, 3), (128, 1), (33, 32)]
# The libraries are built once; nothing in them remembers an example.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)


INT8 = pytest.mark.parametrize("int8", [pytest.param(False, id="bfloat16"), pytest.param(True, id="int8")])


@INT8
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 16, 34])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 2), (3, 3), (4, 1)])
def test_attends_as_a_softmax_does(
    library: KernelLibrary, head_dim: int, num_heads: int, num_kv_heads: int, int8: bool
) -> None:
    case = PagedCase(RAGGED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, int8=int8)
    torch.testing.assert_close(case.attend(library).double(), case.oracle(), rtol=0, atol=TOLERANCE)


@INT8
@pytest.mark.parametrize("window", [1, 2, 16, 33, 130, 1000])
def test_a_sliding_window_ends_where_it_should(library: KernelLibrary, window: int, int8: bool) -> None:
    case = PagedCase(RAGGED, block_size=32, int8=int8)
    torch.testing.assert_close(case.attend(library, window).double(), case.oracle(window), rtol=0, atol=TOLERANCE)


@INT8
@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 257])
def test_every_remainder_of_a_chunk(library: KernelLibrary, context: int, int8: bool) -> None:
    lengths = [(context, min(context, new)) for new in (1, 11, 12, 65)]
    case = PagedCase(lengths, block_size=64, head_dim=80, int8=int8)
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
    int8=st.booleans(),
)
def test_what_else_is_in_the_batch_where_and_on_how_many_threads_shows_in_no_bit(
    libraries: Libraries,
    lengths: list[tuple[int, int]],
    window: int | None,
    block_size: int,
    num_threads: int,
    seed: int,
    int8: bool,
) -> None:
    library = libraries("amx-emulated" if seed % 4 == 0 else "portable")
    check_bits(library, lengths, window, block_size, num_threads, seed, int8)


@SHARED
@given(
    lengths=st.lists(st.integers(1, 900).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), max_size=5),
    window=st.sampled_from([None, 1, 30, 128, 200]),
    block_size=st.sampled_from([16, 32, 64]),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
    int8=st.booleans(),
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
    int8: bool,
) -> None:
    check_bits(libraries(name), lengths, window, block_size, num_threads, seed, int8)


def check_bits(
    library: KernelLibrary,
    lengths: list[tuple[int, int]],
    window: int | None,
    block_size: int,
    num_threads: int,
    seed: int,
    int8: bool,
) -> None:
    """One sequence alone in one piece, and the same at the end of a batch, its last tokens in a piece of their own."""
    subject = (200, 200)
    alone = PagedCase([subject], seed=seed, head_dim=48, int8=int8)
    whole = alone.attend(library, window)
    num_last = 1 + seed % 199
    settings = {"block_size": block_size, "seed": seed + 1, "placement": seed, "head_dim": 48, "int8": int8}
    batch = PagedCase([*lengths, (200, num_last)], **settings)  # type: ignore[arg-type]
    batch.q[-num_last:] = alone.q[-num_last:]
    stored = alone.cache[alone.tables[0], LAYER].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :200]
    batch.put(batch.tables[-1], stored)
    pieced = batch.attend(library, window, num_threads)[-num_last:]
    assert torch.equal(pieced.view(torch.int16), whole[-num_last:].view(torch.int16))


def test_scores_that_dwarf_the_earlier_ones_leave_no_trace_of_them(library: KernelLibrary) -> None:
    case = PagedCase([(260, 260)], head_dim=32)
    for token in range(128, 260):  # one chunk later every score is thousands larger
        block = case.tables[0][token // 16]
        case.cache[block, 1, 0, :, token % 16] *= 1000
        case.keys_values[0][0, :, token] *= 1000
    torch.testing.assert_close(case.attend(library).double(), case.oracle(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 40])
def test_codes_weigh_as_the_numbers_that_they_stand_for(library: KernelLibrary, window: int | None) -> None:
    """Whole numbers up to 127 times a power of two are the same in 8 bits and in bfloat16, and so is every bit."""
    kept, in_codes = PagedCase(RAGGED, head_dim=80), PagedCase(RAGGED, head_dim=80, int8=True)
    generator = torch.Generator().manual_seed(5)
    for number, (table, (context, _)) in enumerate(zip(kept.tables, RAGGED, strict=True)):
        whole = torch.randint(-127, 128, (2, 2, context, 80), generator=generator).float()
        whole[..., number] = 127.0
        exponents = torch.randint(-9, -3, (2, 2, context, 1), generator=generator)
        values = torch.ldexp(whole, exponents).bfloat16()
        kept.put(table, values)
        in_codes.put(table, quantized(values))
    expected = kept.attend(library, window)
    assert expected.isfinite().all()
    assert torch.equal(in_codes.attend(library, window).view(torch.int16), expected.view(torch.int16))


def test_a_row_of_8_bits_that_is_no_number_is_seen_as_one_by_those_who_see_it(library: KernelLibrary) -> None:
    case = PagedCase([(200, 1), (200, 1)], int8=True)
    values = torch.zeros(2, 2, 1, 64)
    values[1, 0, 0, 5] = torch.inf
    block = case.tables[0][3 // 16]
    case.cache[block, LAYER, :, :, 3] = quantized(values)[:, :, 0]
    result = case.attend(library)
    assert result[0, :3].isnan().all(), "the heads that share its KV head"
    assert result[0, 3:].isfinite().all()
    assert result[1].isfinite().all()
