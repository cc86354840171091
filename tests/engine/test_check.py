"""What is looked at before a model is loaded, on machines made up; and memory that runs out all the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from services.engine.capacity import default_gpu_bytes
from services.engine.check import Machine, check_engine, torch_has_cuda
from services.engine.config import EngineConfig
from services.engine.model_config import ModelError
from services.engine.native import engine as native_engine
from services.engine.native.engine import Engine
from services.machine import Gpu
from services.settings import SettingsError
from tests.hf_models import write_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("check") / "model", "qwen2"))


def with_gpus(*gpus: Gpu) -> Machine:
    return Machine(8 * GIB, gpus, frozenset())


def test_a_worker_looks_at_the_gpu_that_it_will_take(model: str) -> None:
    free, busy = Gpu("0", 16 * GIB, 15 * GIB), Gpu("1", 16 * GIB, 1000)
    check_engine(EngineConfig(model), with_gpus(free, busy))
    with pytest.raises(ModelError, match=r"one worker needs .* for weights, .* available on GPU 1"):
        check_engine(EngineConfig(model), with_gpus(busy, free))
    with pytest.raises(ModelError, match="available on GPU 1"):
        check_engine(EngineConfig(model), with_gpus(free, busy), num_workers=2)


def test_what_is_not_known_refuses_nothing(model: str) -> None:
    check_engine(EngineConfig(model), with_gpus(Gpu("0")), num_workers=9)
    check_engine(EngineConfig(model, kv_cache_memory_bytes=GIB), Machine(0, (), frozenset()), num_workers=9)


def test_a_gpu_is_no_use_to_a_worker_that_is_to_compute_on_the_cpu(model: str) -> None:
    with pytest.raises(SettingsError, match=r"8\.0 GiB are available on this machine"):
        check_engine(EngineConfig(model, device="cpu", kv_cache_memory_bytes=9 * GIB), with_gpus(Gpu("0", 80 * GIB)))


def test_workers_that_share_a_gpu_get_their_shares_whoever_comes_first() -> None:
    total, weights, share = 80 * GIB, 16 * GIB, 0.45
    first = default_gpu_bytes(total - weights, total, weights, share)
    second = default_gpu_bytes(total - weights - first - weights, total, weights, share)
    assert first == second == int(0.45 * total) - weights
    assert default_gpu_bytes(total - weights, total, weights, 0.9) == int(0.9 * total) - weights


def test_what_others_have_taken_is_not_given_out() -> None:
    assert default_gpu_bytes(2 * GIB, 80 * GIB, 16 * GIB, 0.9) == int(0.95 * 2 * GIB)
    assert default_gpu_bytes(2 * GIB, 16 * GIB, 15 * GIB, 0.9) == 0


def test_the_build_of_torch_is_known_without_importing_it() -> None:
    assert torch_has_cuda() == (torch.version.cuda is not None)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)], ids=["torch", "numpy"])
def test_memory_that_runs_out_is_said_in_a_line(
    allocate: Callable[[], object], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_engine, "choose_num_blocks", lambda *_: allocate())
    with pytest.raises(ModelError, match=r"memory ran out .*; lower --kv-cache-memory-bytes") as caught:
        Engine.from_config(EngineConfig(model, max_model_len=128))
    assert "\n" not in str(caught.value)


def test_an_error_of_ours_is_no_lack_of_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(native_engine, "choose_num_blocks", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        Engine.from_config(EngineConfig(model, max_model_len=128))
