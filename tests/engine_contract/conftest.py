"""Every engine, as factories: those that compute here, and vLLM where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.api import Engine
from services.engine.config import EngineConfig
from services.engine.native import Engine as NativeEngine
from services.engine.paced import open_paced
from tests.engine_contract.vllm_engines import DEVICE, VllmEngines
from tests.hf_models import write_model

TIER_AND_GUESSES: dict[str, Any] = {"kv_offloading_size": 0.01, "speculative_method": "ngram", "prompt_lookup_min": 1}
ENGINES: dict[str, Callable[[EngineConfig], Engine]] = {
    "native": NativeEngine.from_config,
    "native with a host tier and guesses": lambda config: NativeEngine.from_config(replace(config, **TIER_AND_GUESSES)),
    "native in 8 bits": lambda config: NativeEngine.from_config(replace(config, kv_cache_dtype="int8")),
    "paced": lambda config: open_paced(replace(config, engine="paced"), sleep=lambda seconds: None),
}
_NO_GPU = "needs a CUDA device, and the vLLM for it"
_HERE = [pytest.mark.vllm, pytest.mark.skipif(DEVICE != "cpu", reason="the vLLM that is installed computes on GPUs")]
_ON_A_GPU = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason=_NO_GPU)]
VLLM = (
    [
        pytest.param("vllm", marks=_HERE),
        pytest.param("vllm of two ranks", marks=[*_HERE, pytest.mark.slow]),
        pytest.param("vllm on a GPU", marks=_ON_A_GPU),
        pytest.param("vllm of two ranks on GPUs", marks=[*_ON_A_GPU, pytest.mark.slow]),
    ]
    if importlib.util.find_spec("vllm")
    else []
)
"""Where it is installed."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is asked of vLLM is asked of it on a GPU, where the one that is installed computes on GPUs."""
    for item in items:
        if DEVICE == "cuda" and Path(__file__).parent in item.path.parents and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)


@pytest.fixture(scope="module")
def wider_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that vLLM computes on a CPU: heads of 32 numbers at least."""
    return write_model(tmp_path_factory.mktemp("models") / "wider", "llama3", seed=3, head_dim=32)


@pytest.fixture(scope="module")
def settings() -> dict[str, int]:
    return {
        "block_size": 16,
        "max_model_len": 400,
        "num_gpu_blocks_override": 40,
        "max_num_batched_tokens": 32,
        "max_num_waiting": 3,
    }


@pytest.fixture(scope="module")
def vllm_engines(wider_model: Path, settings: dict[str, int]) -> VllmEngines:
    """Their blocks are twice as long, and so is all else."""
    per_token = ("block_size", "max_model_len", "max_num_batched_tokens")
    return VllmEngines(wider_model, **{name: value * (1 + (name in per_token)) for name, value in settings.items()})


@pytest.fixture(scope="module")
def vllm_of_two(vllm_engines: VllmEngines) -> Iterator[VllmEngines]:
    """The same, divided among two ranks."""
    engines = vllm_engines.divided(2)
    yield engines
    engines.close()


@pytest.fixture(params=[*ENGINES, *VLLM])
def make(request: pytest.FixtureRequest, model: Path, settings: dict[str, int]) -> Iterator[Callable[[], Engine]]:
    """Makes engines; when the test ends, nobody may hold a block of any."""
    made: list[Engine] = []
    lender: VllmEngines | None = None
    if request.param not in ENGINES:
        lender = request.getfixturevalue("vllm_of_two" if "two ranks" in request.param else "vllm_engines")

    def make_one() -> Engine:
        config = EngineConfig(str(model), device="cpu", **settings)  # type: ignore[arg-type]
        made.append(lender.make() if lender is not None else ENGINES[request.param](config))
        return made[-1]

    yield make_one
    for engine in made:
        engine.check_integrity()
        load = engine.load()
        assert (load.num_lent_blocks, load.num_free_blocks) == (0, load.num_blocks)
        assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (0, 0, 0)
    if lender is not None:
        lender.take_back()


@pytest.fixture
def engine(make: Callable[[], Engine]) -> Engine:
    return make()
