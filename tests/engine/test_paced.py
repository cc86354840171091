"""The paced engine: steps last what the profile says, and a token follows from every block that it should have seen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.block import ProofKey
from services.engine import paced
from services.engine.api import Engine, Request, SamplingParams
from services.engine.check import Machine, check_engine
from services.engine.choice import open_engine
from services.engine.config import EngineConfig
from services.engine.model_config import ModelNotFound
from services.engine.native import Engine as NativeEngine
from services.engine.paced import open_paced, read_profile
from services.rates import StepShape
from services.settings import SettingsError
from tests.hf_models import random_prompts, write_model

CONFIG = {"block_size": 16, "max_model_len": 256, "num_gpu_blocks_override": 32, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights."""
    directory = write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)
    (directory / "model.safetensors").unlink()
    return directory


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def make(model: Path, slept: list[float]) -> Callable[..., Engine]:
    def make_one(**settings: object) -> Engine:
        config = EngineConfig(str(model), engine="paced", **{**CONFIG, **settings})  # type: ignore[arg-type]
        return open_paced(config, sleep=slept.append)

    return make_one


def ask(name: str, prompt: list[int], num_tokens: int = 8, **sampling: object) -> Request:
    chosen = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, **sampling}
    return Request(name, prompt, SamplingParams(**chosen))  # type: ignore[arg-type]


def finish(engine: Engine) -> list[int]:
    tokens = []
    while engine.has_work:
        tokens += [token.token_id for update in engine.step().updates for token in update.new_tokens]
    return tokens


def run(engine: Engine, prompt: list[int], **sampling: object) -> list[int]:
    engine.add_request(ask("r", prompt, **sampling))
    return finish(engine)


def test_a_step_sleeps_for_what_its_shape_costs_and_no_longer(make, slept) -> None:
    engine, profile = make(), read_profile("gpu")
    engine._runner.clock = itertools.count(0.0, 0.001).__next__  # a millisecond goes by in each step
    (prompt,) = random_prompts([50])
    run(engine, prompt)
    shapes = [StepShape(50, 50 * 51 // 2), *(StepShape(0, 0, 1, 50 + n) for n in range(1, 8))]
    assert len(slept) == len(shapes)
    for seconds, shape in zip(slept, shapes, strict=True):
        assert seconds == pytest.approx(profile.step_s(shape) - 0.001)


@pytest.mark.parametrize("what", ["zero", "another", "stale"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_missing_or_wrong_block_gives_wrong_tokens(make, what: str, which: int) -> None:
    prompt, other = random_prompts([70, 70], seed=5)
    right, engine = run(make(), prompt), make()
    engine.add_request(ask("r", prompt))
    while engine.stats.num_generated_tokens < 3:
        engine.step()
    # A pool of 32 blocks, given out in order: the prompt's are those that are not zero.
    table = [b for b in range(32) if np.asarray(engine.memory.view(b)).any()]
    block = np.asarray(engine.memory.view(table[which]))
    if what == "zero":
        block[:] = 0
    elif what == "another":
        block[:] = np.asarray(engine.memory.view(table[1]))
    else:
        stranger = make()
        run(stranger, other)
        theirs = [b for b in range(32) if np.asarray(stranger.memory.view(b)).any()]
        block[:] = np.asarray(stranger.memory.view(theirs[which]))
    rest = finish(engine)
    assert len(rest) == 5
    assert rest != right[3:]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 7}, {"logprobs": 3}, {"prompt_logprobs": 2, "presence_penalty": 1.0}]
)
def test_tokens_are_the_same_in_any_chunks_and_company(make, sampling) -> None:
    prompts = random_prompts([70, 40, 3])
    apart = [run(make(max_num_batched_tokens=17), prompt, **sampling) for prompt in prompts]
    together, tokens = make(), {}
    for i, prompt in enumerate(prompts):
        together.add_request(ask(str(i), prompt, **sampling))
    while together.has_work:
        for update in together.step().updates:
            tokens.setdefault(update.request.request_id, []).extend(token.token_id for token in update.new_tokens)
    assert [tokens[str(i)] for i in range(3)] == apart
    assert len({tuple(each) for each in apart}) == 3


def test_it_says_that_it_is_a_simulation_and_shares_no_block_with_a_real_one(make, tmp_path) -> None:
    real_model = write_model(tmp_path / "llama3", "llama3", seed=3)
    config = EngineConfig(str(real_model), device="cpu", **CONFIG)  # type: ignore[arg-type]
    simulated, real = make(), NativeEngine.from_config(config)
    assert (simulated.capabilities.is_simulation, real.capabilities.is_simulation) == (True, False)
    assert simulated.capabilities.compute["kernels"] == "paced"
    assert simulated.layout != real.layout
    assert replace(simulated.layout, model_fingerprint=real.layout.model_fingerprint) == real.layout


def test_shipped_profiles_say_where_their_figures_come_from() -> None:
    for name in ("gpu", "cpu"):
        profile = read_profile(name)
        assert profile.name == name
        assert "measured" in profile.origin
        assert profile.step_s(StepShape(512, 512 * 513 // 2)) > profile.step_s(StepShape(0, 0, 1, 512)) > 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "give cpu, gpu"),
        ([], "JSON object"),
        ({"base_s": -1}, "base_s must be seconds"),
        ({"base_s": True}, "base_s must be seconds"),
        ({"bas_s": 1}, "bas_s is not known"),
        ({"max_num_seqs": 1.5}, "max_num_seqs must be a number"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused_by_name(tmp_path, values, words) -> None:
    path = tmp_path / "mine.json"
    whole = json.loads((Path(paced.__file__).parent / "profiles" / "gpu.json").read_text())
    if values is not None:
        path.write_text(json.dumps({**whole, **values} if values else values))
    with pytest.raises(SettingsError, match=words):
        read_profile(str(path))


def test_it_can_be_started_where_there_are_no_weights_and_not_with_a_profile_that_is_not_there(model) -> None:
    machine = Machine(available_bytes=8 << 30, gpus=[], processor_flags=frozenset())
    config = EngineConfig(str(model), engine="paced", **CONFIG)  # type: ignore[arg-type]
    assert check_engine(config, machine).num_parameters == 0
    with pytest.raises(ModelNotFound, match="no weights"):
        check_engine(replace(config, engine="native"), machine)
    with pytest.raises(SettingsError, match="give cpu, gpu"):
        check_engine(replace(config, paced_profile="tpu"), machine)


def test_open_engine_opens_what_the_settings_name(model) -> None:
    config = EngineConfig(str(model), engine="paced", **CONFIG)  # type: ignore[arg-type]
    assert open_engine(config, ProofKey.public()).capabilities.is_simulation
