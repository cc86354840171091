"""Helper threads bring panels of products, or fall asleep in the midst of one: no bit shows it, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.native.kernels.library import Epilogue, KernelLibrary, Workspace
from services.engine.native.model.model import load_model
from services.engine.native.model.projection import Projection
from tests.bench.bench_engine import make_batch
from tests.hf_models import write_model
from tests.kernels.conftest import STALLED, Libraries

NUM_HELPERS = 2
MAX_ROUNDS = 300


@contextmanager
def helped(library: KernelLibrary, num_helpers: int = NUM_HELPERS) -> Iterator[None]:
    """With helpers; what they read must live as long."""
    assert library.use_helpers(num_helpers) == num_helpers
    try:
        yield
    finally:
        assert library.use_helpers(0) == 0
        library.wait_for_helpers()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Product:
    """A projection of some rows, by turns without helpers and with them, in one workspace."""

    def __init__(self, library: KernelLibrary, epilogue: Epilogue, num_rows: int, *, int8: bool, seed: int = 0) -> None:
        gated = epilogue >= Epilogue.GATE_SILU
        weight, bias = normal(200 * (1 + gated), 300, seed=seed), normal(200 * (1 + gated), seed=seed + 1)
        self.projection = Projection(library, weight, bias, int8=int8, gated=gated)
        self.epilogue, self.x, self.residual = (
            epilogue,
            normal(num_rows, 300, seed=seed + 2),
            normal(num_rows, 200, seed=3),
        )

    def result(self, workspace: Workspace) -> Tensor:
        y = self.residual.float() if self.epilogue is Epilogue.WRITE_FLOAT else self.residual.clone()
        self.projection(self.x, y, self.epilogue, workspace, 1)
        return y


@pytest.mark.parametrize("int8", [False, True])
def test_helpers_change_no_bit(library: KernelLibrary, int8: bool) -> None:
    workspace = Workspace()
    products = [Product(library, epilogue, num_rows, int8=int8) for epilogue in Epilogue for num_rows in (64, 267)]
    alone = [product.result(workspace) for product in products]
    with helped(library):
        for _ in range(2):
            for product, expected in zip(products, alone, strict=True):
                assert torch.equal(product.result(workspace), expected)


def test_a_helper_that_sleeps_holds_nobody_up_and_wakes_up_to_no_harm(libraries: Libraries) -> None:
    """They sleep at every place where they could be taken off, here, while products of other operands come and go."""
    library, workspace = libraries(STALLED), Workspace()
    products = [
        Product(library, epilogue, num_rows, int8=int8, seed=seed)
        for seed, (epilogue, num_rows, int8) in enumerate(
            [(Epilogue.ADD, 70, False), (Epilogue.GATE_SILU, 300, True), (Epilogue.WRITE_FLOAT, 120, False)]
        )
    ]
    alone = [product.result(workspace) for product in products]
    helped_before, redone_before = library.count_helped()
    with helped(library):
        for _ in range(MAX_ROUNDS):
            for product, expected in zip(products, alone, strict=True):
                assert torch.equal(product.result(workspace), expected)
            num_helped, num_redone = library.count_helped()
            if num_helped > helped_before + 3 and num_redone > redone_before + 3:
                return
    pytest.skip("no processor was idle for long enough")


def test_few_rows_are_not_helped_with(libraries: Libraries) -> None:
    library, workspace = libraries("portable"), Workspace()
    product = Product(library, Epilogue.WRITE, 63, int8=False)
    before = library.count_helped()
    with helped(library):
        for _ in range(50):
            product.result(workspace)
    assert library.count_helped() == before


def test_no_more_helpers_than_there_is_room_for(libraries: Libraries) -> None:
    library = libraries("portable")
    assert library.use_helpers(17) == 16
    assert library.use_helpers(0) == 0


def test_a_workspace_keeps_what_helpers_may_still_read() -> None:
    workspace = Workspace()
    addresses = [workspace.address(num_bytes) for num_bytes in (64, 100, 128, 200, 250, 1000)]
    assert len(set(addresses)) == 4, "from 100 to 200 at once"
    assert sum(each.nbytes for each in workspace._outgrown) <= workspace._memory.nbytes


def test_a_model_s_logits_are_the_same_with_helpers(tmp_path: Path, libraries: Libraries) -> None:
    path = write_model(tmp_path / "m", "qwen2", dtype="bfloat16", head_dim=16)
    plain = load_model(str(path), num_threads=1)
    if plain.compute_path.kernels == "torch":
        pytest.skip("no kernels of this processor are built")
    batch = make_batch(2, 90, 80, plain.config.vocab_size)
    logits = plain.forward(batch, plain.new_kv_cache(6, 32).zero_())
    helping = load_model(str(path), num_threads=1, num_helpers=2)
    try:
        for _ in range(5):
            assert torch.equal(helping.forward(batch, helping.new_kv_cache(6, 32).zero_()), logits)
    finally:
        helping.computation._library.use_helpers(0)  # type: ignore[attr-defined]
