"""vLLM with a model divided among ranks: its blocks are those of one rank, whoever hands them over to whom."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.engine.api import Engine, EngineError
from tests.engine_contract.test_engine_contract import ask, check_handoff, prompt_of, run, tokens
from tests.engine_contract.vllm_engines import VllmEngines
from tests.hf_models import write_model

pytestmark = pytest.mark.vllm
if importlib.util.find_spec("vllm") is None:  # `make test` is free of it
    pytest.skip("vLLM is not installed", allow_module_level=True)


@pytest.fixture
def make(vllm_engines: VllmEngines, vllm_of_two: VllmEngines) -> Iterator[Callable[[int], Engine]]:
    fleets = {1: vllm_engines, 2: vllm_of_two}
    yield lambda num_ranks: fleets[num_ranks].make()
    for engines in fleets.values():
        engines.take_back()


@pytest.mark.parametrize(("giver", "taker"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_prompt_is_handed_over_whatever_the_number_of_ranks(
    make: Callable[[int], Engine], giver: int, taker: int
) -> None:
    oracle, source, target = make(1), make(giver), make(taker)  # the first one computes in this process
    assert source.layout == target.layout == oracle.layout
    assert len(source.memory.geometry.regions) == giver
    for num_tokens in (1, 16, 17, 90):
        said = check_handoff(source, target, num_tokens)
        prompt = prompt_of(oracle, num_tokens, seed=num_tokens)
        assert said == tokens(run(oracle, ask("r", prompt)), "r")


def test_a_rank_that_is_killed_ends_the_engine_and_leaves_nothing(vllm_of_two: VllmEngines) -> None:
    engine, lost = vllm_of_two.make(), threading.Event()
    engine.when_lost(lost.set)
    engine.add_request(ask("r", prompt_of(engine, 90)))
    engine.step()
    ranks = [worker.proc for worker in engine._core.model_executor.workers]
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert lost.wait(120)
    assert engine.has_work
    with pytest.raises(EngineError, match="a rank of vLLM's is gone"):
        engine.step()
    vllm_of_two.lose()
    assert not any(rank.is_alive() for rank in ranks)


@pytest.mark.slow
def test_a_head_that_both_ranks_have_is_read_from_one_and_given_to_both(
    tmp_path: Path, settings: dict[str, int]
) -> None:
    model = write_model(tmp_path / "one_head", "llama3", seed=5, head_dim=32, num_key_value_heads=1)
    alone = VllmEngines(model, **{**settings, "block_size": 32, "max_num_batched_tokens": 64})
    of_two = alone.divided(2)
    try:
        source, target = alone.make(), of_two.make()
        assert source.layout == target.layout
        assert len(target.memory.geometry.regions) == 1
        for num_tokens in (16, 90):
            check_handoff(source, target, num_tokens)
            check_handoff(target, source, num_tokens + 1)
    finally:
        of_two.close()
        alone.close()
