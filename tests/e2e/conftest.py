"""What end-to-end tests share: models by family, transports, and stacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.hf_models import write_model
from tests.stack import Stack, preload

PATIENT = "--peer-timeout-s 20"
"""Of workers on a machine that does other things too: nobody is left because it waits for a processor."""
PATIENT_ROUTER = "--silence-timeout-s 20"
"""The same of a router."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked `on_vllm` with either engine: with vLLM in the default tests of it, or (`slow=True`) not."""
    mark = metafunc.definition.get_closest_marker("on_vllm")
    if mark is not None and "engine" in metafunc.fixturenames:
        is_slow = mark.kwargs.get("slow", False)
        marks = [pytest.mark.vllm, *([pytest.mark.slow] if is_slow else [])]
        metafunc.parametrize("engine", ["native", pytest.param("vllm", marks=marks)], scope="module")


def pytest_itemcollected(item: pytest.Item) -> None:
    """By default one of the transports is enough, nixl for vLLM and else what the mark `over` names: they carry bytes.

    Over either go the contract of transports and `test_tokens`.
    """
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    over = item.get_closest_marker("over")
    default = "nixl" if params.get("engine") == "vllm" else over.args[0] if over is not None else None
    if default is not None and params.get("transport", default) != default:
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("vllm") for item in session.items):
        preload("vllm")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A random model of that family, which that engine computes, the same for all tests.

    vLLM always has the same one: it takes half a minute of a processor to look at another architecture.
    """

    @cache
    def model(family: str, engine: str) -> Path:
        directory = tmp_path_factory.mktemp(family) / "model"
        if engine == "vllm":  # heads of 32 numbers at least
            return write_model(directory, "llama3", seed=3, head_dim=32)
        return write_model(directory, family)

    return model


@pytest.fixture(scope="module")
def engine() -> str:
    """What computes; see `pytest_generate_tests`."""
    return "native"


@pytest.fixture(scope="module")
def model_of(models: Callable[[str, str], Path], engine: str) -> Callable[[str], Path]:
    """A random model of that family, or of another one that the engine computes, the same for all tests."""
    return lambda family: models(family, engine)


@pytest.fixture(scope="module", params=["ucxx", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    """A module whose stack asks for it is tested with each."""
    return str(request.param)


@pytest.fixture(scope="module")
def new_stack(tmp_path_factory: pytest.TempPathFactory, engine: str) -> Callable[..., Stack]:
    """Makes a stack that serves a model as "m", to be entered; arguments are `Stack`'s.

    Its processes are patient with each other, unless `worker` and `router` say otherwise.
    """

    def new(model: Path, worker: str = "", router: str = "", **fields: object) -> Stack:
        worker, router = f"{PATIENT} {worker}", f"{PATIENT_ROUTER} {router}"
        directory = tmp_path_factory.mktemp("stack")
        return Stack(directory, model=model, worker=worker, router=router, engine=engine, **fields)  # type: ignore[arg-type]

    return new
