"""What end-to-end tests share: models by family, transports, and stacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.hf_models import write_model
from tests.stack import Stack

PATIENT = "--peer-timeout-s 20"
"""Of workers on a machine that does other things too: nobody is left because it waits for a processor."""
PATIENT_ROUTER = "--silence-timeout-s 20"
"""The same of a router."""


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of that family, the same for all tests."""
    return cache(lambda family: write_model(tmp_path_factory.mktemp(family) / "model", family))


@pytest.fixture(scope="module", params=["ucxx", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    """A module whose stack asks for it is tested with each."""
    return str(request.param)


@pytest.fixture(scope="session")
def new_stack(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Stack]:
    """Makes a stack that serves a model as "m", to be entered; arguments are `Stack`'s.

    Its processes are patient with each other, unless `worker` and `router` say otherwise.
    """

    def new(model: Path, worker: str = "", router: str = "", **fields: object) -> Stack:
        worker, router = f"{PATIENT} {worker}", f"{PATIENT_ROUTER} {router}"
        return Stack(tmp_path_factory.mktemp("stack"), model=model, worker=worker, router=router, **fields)  # type: ignore[arg-type]

    return new
