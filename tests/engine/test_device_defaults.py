"""What the settings leave open is vLLM's on a GPU, by its memory, and ours on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from services.engine.config import EngineConfig, with_device_defaults
from services.engine.native import engine as native_engine
from services.engine.native.engine import Engine
from services.engine.native.model.model import load_model
from services.engine.tensor_memory import gpu_of
from services.machine import Gpu
from tests.hf_models import write_model


@pytest.mark.parametrize(
    ("gpu", "num_seqs", "num_tokens"),
    [
        (None, 64, 512),
        (Gpu("0", 24 << 30, model="NVIDIA L4"), 256, 2048),
        (Gpu("0", 79 << 30, model="NVIDIA H100 80GB HBM3"), 1024, 8192),
        (Gpu("0", 179 << 30, model="NVIDIA B200"), 1024, 16384),
        (Gpu("0", 79 << 30, model="NVIDIA A100-SXM4-80GB"), 256, 2048),
        (Gpu("0"), 256, 2048),
    ],
)
def test_defaults_are_the_devices(gpu: Gpu | None, num_seqs: int, num_tokens: int) -> None:
    config = with_device_defaults(EngineConfig("m"), gpu)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (num_seqs, num_tokens)


def test_what_is_set_stays() -> None:
    config = with_device_defaults(EngineConfig("m", max_num_seqs=3), Gpu("0", 24 << 30))
    assert config == EngineConfig("m", max_num_seqs=3, max_num_batched_tokens=2048)


def test_an_engine_takes_the_defaults_of_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(write_model(tmp_path / "model", "qwen2")), max_model_len=128)

    def limits() -> tuple[int, int]:
        engine = Engine(model, EngineConfig("m"), num_blocks=8)
        return engine.capabilities.max_num_seqs, engine._scheduler.config.max_num_batched_tokens

    assert limits() == (64, 512)
    monkeypatch.setattr(native_engine, "gpu_of", lambda device: Gpu(device, 79 << 30, model="NVIDIA H100"))
    assert limits() == (1024, 8192)


def test_torch_says_what_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=24 << 30, name="NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_of("cuda:1") == Gpu("cuda:1", 24 << 30, model="NVIDIA L4")
    assert gpu_of("cpu") is None
