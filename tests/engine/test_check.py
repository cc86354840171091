"""What is looked at before a model is loaded, on machines made up; and memory that runs out all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.engine.capacity import default_gpu_bytes
from services.engine.check import Machine, check_engine, look_at_model, torch_has_cuda, weight_bytes
from services.engine.config import EngineConfig
from services.engine.model_config import ModelError
from services.engine.native import loading
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


def test_a_draft_model_must_have_the_same_tokens(model: str, tmp_path: Path) -> None:
    def check(draft: Path) -> None:
        settings = EngineConfig(model, speculative_method="draft_model", speculative_model=str(draft))
        check_engine(settings, Machine(0, (), frozenset()))

    check(write_model(tmp_path / "same", "llama3"))
    with pytest.raises(ModelError, match=r"500 tokens \(vocab_size\), and .* has 512; take a draft model of the same"):
        check(write_model(tmp_path / "fewer", "llama3", vocab_size=500))
    other = write_model(tmp_path / "other", "llama3")
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(ModelError, match=r"ends by token 7, and that of .* by token 0, 2 \(eos_token_id\)"):
        check(other)
    names = write_model(tmp_path / "names", "llama3")
    tokenizer = json.loads((names / "tokenizer.json").read_text())
    tokenizer["added_tokens"][1]["content"] = "<|start|>"
    (names / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"tokenizers of both differ, as in '<\|(im_)?start\|>', token 1 of one"):
        check(names)
    with pytest.raises(ModelError, match="/no/such/draft is not there"):
        check(Path("/no/such/draft"))


def test_a_draft_model_s_weights_and_keys_and_values_are_counted(model: str) -> None:
    drafting = EngineConfig(model, speculative_method="draft_model", speculative_model=model)
    alone = look_at_model(model)
    enough = Machine(weight_bytes(alone, "cpu") * 3 // 2, (), frozenset())
    check_engine(EngineConfig(model, num_gpu_blocks_override=1, max_model_len=32), enough)
    with pytest.raises(ModelError, match=r"one worker needs .* for weights"):
        check_engine(drafting, enough)
    size = {"kv_cache_memory_bytes": 10 * alone.block_bytes(32, "auto"), "device": "cpu"}
    assert Engine.from_config(EngineConfig(model, max_model_len=64, **size)).pool.num_blocks == 10  # type: ignore[arg-type]
    engine = Engine.from_config(replace(drafting, max_model_len=64, **size))  # type: ignore[arg-type]
    assert engine.pool.num_blocks == 5
    assert engine.layout == Engine.from_config(EngineConfig(model, max_model_len=64, **size)).layout  # type: ignore[arg-type]


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)], ids=["torch", "numpy"])
def test_memory_that_runs_out_is_said_in_a_line(
    allocate: Callable[[], object], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "choose_num_blocks", lambda *_: allocate())
    with pytest.raises(ModelError, match=r"memory ran out .*; lower --kv-cache-memory-bytes") as caught:
        Engine.from_config(EngineConfig(model, max_model_len=128))
    assert "\n" not in str(caught.value)


def test_an_error_of_ours_is_no_lack_of_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loading, "choose_num_blocks", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        Engine.from_config(EngineConfig(model, max_model_len=128))
