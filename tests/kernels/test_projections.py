"""Packed projections in C against torch: every remainder of a tile, every epilogue, nothing outside the result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.native.kernels.library import Epilogue, KernelLibrary, Workspace
from services.engine.native.model.projection import MAX_INT8_DEPTH, Projection
from tests.kernels.conftest import Libraries

ROWS = [1, 2, 5, 11, 12, 13, 16, 17, 31, 32, 33, 64, 75]
ACTIVATIONS = {
    Epilogue.GATE_SILU: F.silu,
    Epilogue.GATE_GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Epilogue.GATE_GELU_ERF: F.gelu,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def multiply(
    projection: Projection, x: Tensor, epilogue: Epilogue, y: Tensor | None = None, num_threads: int = 1
) -> Tensor:
    """Multiply into the middle of a poisoned array, of which everything else must stay as it was."""
    num_rows, width = len(x), projection.num_outputs
    dtype = torch.float32 if epilogue is Epilogue.WRITE_FLOAT else torch.bfloat16
    room = torch.full((num_rows + 2, width + 5), torch.nan, dtype=dtype)
    result = room[1:-1, 2:-3]
    if y is not None:
        result.copy_(y)
    projection(x, result, epilogue, Workspace(), num_threads)
    outside = torch.ones(room.shape, dtype=torch.bool)
    outside[1:-1, 2:-3] = False
    assert room[outside].isnan().all()
    return result.clone()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("num_outputs", "depth"), [(1, 1), (5, 31), (33, 32), (32, 100), (70, 129), (48, 65), (20, 600)]
)
def test_products_of_whole_numbers_are_exact(library: KernelLibrary, num_outputs: int, depth: int, int8: bool) -> None:
    weight = whole_numbers(num_outputs, depth)
    weight[:, 0] = 127  # the largest of each row: the int8 scale is 1
    projection = Projection(library, weight, None, int8=int8)
    for num_rows in ROWS:
        x = whole_numbers(num_rows, depth, seed=num_rows)
        x[:, 0] = -127
        assert torch.equal(multiply(projection, x, Epilogue.WRITE_FLOAT), x.float() @ weight.float().T)


@pytest.mark.parametrize(("num_outputs", "depth"), [(37, 100), (64, 256), (100, 897)])
def test_products_of_random_numbers_are_those_of_float32(library: KernelLibrary, num_outputs: int, depth: int) -> None:
    weight, bias = normal(num_outputs, depth, seed=1), normal(num_outputs, seed=2)
    projection = Projection(library, weight, bias)
    for num_rows in ROWS:
        x = normal(num_rows, depth, seed=num_rows)
        exact = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(multiply(projection, x, Epilogue.WRITE_FLOAT).double(), exact, rtol=1e-5, atol=1e-4)
        rounded = multiply(projection, x, Epilogue.WRITE).double()
        torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=1e-3)


def test_the_residual_is_added_before_rounding(library: KernelLibrary) -> None:
    weight, bias = normal(45, 70, seed=1), normal(45, seed=2)
    x, residual = normal(35, 70, seed=3), normal(35, 45, seed=4)
    y = multiply(Projection(library, weight, bias), x, Epilogue.ADD, residual)
    exact = F.linear(x.double(), weight.double(), bias.double()) + residual.double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("epilogue", ACTIVATIONS)
@pytest.mark.parametrize("num_outputs", [1, 15, 16, 17, 50])
def test_gates_act_as_torch_does(library: KernelLibrary, epilogue: Epilogue, num_outputs: int) -> None:
    weight, bias = 0.7 * normal(2 * num_outputs, 40, seed=1), normal(2 * num_outputs, seed=2)
    x = normal(33, 40, seed=3)
    gate, up = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=1)
    y = multiply(Projection(library, weight, bias, gated=True), x, epilogue)
    torch.testing.assert_close(y.double(), ACTIVATIONS[epilogue](gate) * up, rtol=2**-7, atol=2e-4)


@pytest.mark.parametrize("epilogue", ACTIVATIONS)
def test_gates_survive_what_is_far_from_zero(library: KernelLibrary, epilogue: Epilogue) -> None:
    weight = torch.tensor([[1.0], [0.0]]).bfloat16()
    bias = torch.tensor([0.0, 1.0]).bfloat16()
    x = torch.tensor([[-1e30], [-300.0], [-20.0], [-0.0], [20.0], [300.0], [1e12]]).bfloat16()
    y = multiply(Projection(library, weight, bias, gated=True), x, epilogue)
    torch.testing.assert_close(y, ACTIVATIONS[epilogue](x.double()).bfloat16(), rtol=2**-7, atol=1e-6)


def test_int8_is_off_by_a_percent_of_the_largest(library: KernelLibrary) -> None:
    weight, bias, x = normal(70, 300, seed=1), normal(70, seed=2), normal(40, 300, seed=3)
    exact = F.linear(x.double(), weight.double(), bias.double())
    difference = multiply(Projection(library, weight, bias, int8=True), x, Epilogue.WRITE_FLOAT).double() - exact
    assert difference.abs().max() < 0.03 * exact.abs().max()
    assert difference.abs().mean() < 0.01 * exact.abs().mean() * 3


def test_int8_takes_rows_and_weights_of_zeros(library: KernelLibrary) -> None:
    weight, x = normal(40, 70), normal(3, 70)
    weight[7], x[1] = 0, 0
    y = multiply(Projection(library, weight, None, int8=True), x, Epilogue.WRITE_FLOAT)
    assert y.isfinite().all()
    assert not y[1].any()
    assert not y[:, 7].any()


@pytest.mark.parametrize("int8", [False, True])
def test_a_nan_is_in_all_that_is_computed_from_it(library: KernelLibrary, int8: bool) -> None:
    x = normal(20, 70, seed=2)
    x[3, 69] = torch.nan
    y = multiply(Projection(library, normal(40, 70, seed=1), None, int8=int8), x, Epilogue.WRITE_FLOAT)
    assert y[3].isnan().all()
    assert y[:3].isfinite().all()
    assert y[4:].isfinite().all()


@pytest.mark.parametrize("int8", [False, True])
def test_neither_other_rows_nor_threads_show_in_any_bit(library: KernelLibrary, int8: bool) -> None:
    projection = Projection(library, normal(170, 601, seed=1), None, int8=int8)
    x = normal(150, 601, seed=2)
    together = multiply(projection, x, Epilogue.WRITE_FLOAT)
    assert torch.equal(multiply(projection, x, Epilogue.WRITE_FLOAT, num_threads=3), together)
    for first, stop in [(0, 1), (1, 13), (13, 45), (45, 78), (78, 150)]:
        alone = multiply(projection, x[first:stop].clone(), Epilogue.WRITE_FLOAT)
        assert torch.equal(alone, together[first:stop])


def test_more_rows_than_the_cache_holds_at_a_time_are_as_the_few(library: KernelLibrary) -> None:
    weight, x = normal(33, 9000, seed=1), normal(100, 9000, seed=2)
    projection = Projection(library, weight, None)
    together = multiply(projection, x, Epilogue.WRITE_FLOAT)
    assert torch.equal(multiply(projection, x[90:].clone(), Epilogue.WRITE_FLOAT), together[90:])


def test_emulated_tiles_do_what_the_portable_panel_is_defined_to_do(libraries: Libraries) -> None:
    weight, bias, x = normal(75, 333, seed=1), normal(75, seed=2), normal(45, 333, seed=3)
    portable, emulated = (
        multiply(Projection(libraries(name), weight, bias), x, Epilogue.WRITE_FLOAT)
        for name in ("portable", "amx-emulated")
    )
    assert torch.equal(portable, emulated)


def test_int8_gives_the_same_bits_on_every_processor(library: KernelLibrary, libraries: Libraries) -> None:
    weight, x = normal(75, 333, seed=1), normal(45, 333, seed=3)
    ours, portable = (
        multiply(Projection(each, weight, None, int8=True), x, Epilogue.WRITE_FLOAT)
        for each in (library, libraries("portable"))
    )
    assert torch.equal(ours, portable)


def test_the_largest_int8_sums_there_are_do_not_overflow(library: KernelLibrary) -> None:
    """Both sides at their ends, all the way down the deepest product there may be."""
    depth = MAX_INT8_DEPTH
    weight = torch.full((37, depth), 127, dtype=torch.bfloat16)
    weight[1::2] = -127
    weight[2, 1::2] = -127
    x = torch.full((7, depth), 127, dtype=torch.bfloat16)
    x[1::2] = -127
    x[4, ::2] = -127
    exact = x.double() @ weight.double().T
    assert exact.max() == -exact.min() == 127 * 127 * depth
    projection = Projection(library, weight, None, int8=True)
    for num_rows in (1, 2, 7):  # as many at once as different loops take
        assert torch.equal(multiply(projection, x[:num_rows], Epilogue.WRITE_FLOAT), exact[:num_rows].float())


@pytest.mark.parametrize("seed", range(4))
def test_int8_of_any_bits_at_all_is_what_the_portable_kernel_makes_of_them(
    library: KernelLibrary, libraries: Libraries, seed: int
) -> None:
    """Denormal, huge, infinite, not a number: whatever becomes of a row's whole numbers, it is between -127 and 127."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (40, 200), generator=generator).bfloat16()
    x = torch.randint(-(2**15), 2**15, (64, 200), generator=generator).to(torch.int16).view(torch.bfloat16)
    x[:16] *= 2.0**-120
    x[16:32] = x[16:32].nan_to_num(1.0).clamp(-(2.0**-126), 2.0**-126)
    ours, portable = (
        multiply(Projection(each, weight, None, int8=True), x, Epilogue.WRITE_FLOAT)
        for each in (library, libraries("portable"))
    )
    torch.testing.assert_close(ours, portable, rtol=0, atol=0, equal_nan=True)


def test_threads_may_call_at_the_same_time(library: KernelLibrary) -> None:
    projection, x = Projection(library, normal(64, 64, seed=1), None), normal(40, 64, seed=2)
    expected = multiply(projection, x, Epilogue.WRITE_FLOAT)
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(multiply, projection, x, Epilogue.WRITE_FLOAT, None, 2) for _ in range(60)]
        assert all(torch.equal(call.result(), expected) for call in calls)
