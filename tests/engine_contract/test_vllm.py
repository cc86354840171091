"""What is asked of vLLM behind the port beside what every engine does: that it agrees with our own engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from math import isclose
from pathlib import Path

import pytest

from kvstore.block import ProofKey
from kvstore.errors import IncompatibleLayout
from services.engine.api import Engine, FinishReason, InvalidRequest, PositionLogprobs, RequestUpdate
from services.engine.config import EngineConfig
from services.engine.native import Engine as NativeEngine
from services.settings import SettingsError
from tests.engine_contract.test_engine_contract import ask, prompt_of, run, tokens
from tests.engine_contract.vllm_engines import VllmEngines
from tests.hf_models import VOCAB_SIZE, random_prompts

pytestmark = pytest.mark.vllm
if importlib.util.find_spec("vllm") is None:  # `make test` is free of it
    pytest.skip("vLLM is not installed", allow_module_level=True)


@pytest.fixture
def vllm(vllm_engines: VllmEngines) -> Iterator[Engine]:
    yield vllm_engines.make()
    vllm_engines.take_back()


@pytest.fixture
def native(wider_model: Path, settings: dict[str, int]) -> Engine:
    return NativeEngine.from_config(EngineConfig(str(wider_model), device="cpu", **settings))  # type: ignore[arg-type]


GREEDY: dict[str, dict[str, object]] = {
    "plain": {"logprobs": 5},
    "penalized": {"repetition_penalty": 1.4, "frequency_penalty": 0.9, "presence_penalty": 0.6, "logprobs": 2},
    "biased": {"logit_bias": {7: 9.0, 11: -100.0, 450: 6.5}, "logprobs": 0},
    "allowed": {"allowed_token_ids": (5, 9, 77, 301), "logprobs": 3},
    "stopped": {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 7)), "max_tokens": 40},
    "not stopped yet": {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 3)), "min_tokens": 12, "max_tokens": 40},
    "ended": {"ignore_eos": False, "logit_bias": {2: 8.0}, "min_tokens": 3, "max_tokens": 40},
    "of one token": {"max_tokens": 1},
    "with its prompt's": {"prompt_logprobs": 3, "logprobs": 1},
    "with its prompt's own": {"prompt_logprobs": 0},
}


def alike(ours: PositionLogprobs | None, theirs: PositionLogprobs | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    pairs = zip((ours.chosen, *ours.top), (theirs.chosen, *theirs.top), strict=True)
    return all(
        a is not None
        and b is not None
        and (a.token_id, a.rank) == (b.token_id, b.rank)
        and isclose(a.logprob, b.logprob, abs_tol=1e-3)
        for a, b in pairs
    )


@pytest.mark.parametrize("sampling", list(GREEDY))
@pytest.mark.parametrize("num_tokens", [1, 33, 100])
def test_it_says_what_our_own_engine_says(native: Engine, vllm: Engine, sampling: str, num_tokens: int) -> None:
    prompt = random_prompts([num_tokens], seed=num_tokens)[0]
    told: list[list[RequestUpdate]] = []
    for engine in (native, vllm):
        updates = run(engine, ask("r", prompt, **{"max_tokens": 16, **GREEDY[sampling]}))
        told.append([update for update in updates if update.new_tokens])
    ours, theirs = told
    assert tokens(theirs, "r") == tokens(ours, "r")
    assert (theirs[-1].finish_reason, theirs[-1].stop_token_id) == (ours[-1].finish_reason, ours[-1].stop_token_id)
    assert all(alike(a.new_tokens[0].logprobs, b.new_tokens[0].logprobs) for a, b in zip(ours, theirs, strict=True))
    prompts = [update[0].prompt_logprobs for update in (ours, theirs)]
    assert (prompts[0] is None) == (prompts[1] is None)
    if prompts[0] is not None and prompts[1] is not None:
        assert all(map(alike, prompts[0], prompts[1]))
        assert len(prompts[0]) == len(prompts[1]) == num_tokens


@pytest.mark.parametrize("drawn", [{"seed": 5}, {"seed": 2**64 - 1, "top_p": 0.8}, {"seed": 0, "min_p": 0.05}])
def test_a_seed_draws_the_same_however_the_prompt_is_cut_and_in_any_company(
    vllm_engines: VllmEngines, drawn: dict[str, object]
) -> None:
    # Generators of CPUs cannot be taken back, as vLLM would with a prompt that is cut.
    first, second = vllm_engines.make(), vllm_engines.make()
    wanted = ask("r", prompt_of(first, 90), temperature=1.3, max_tokens=20, **drawn)
    alone = tokens(run(first, wanted), "r")
    company = [ask(f"o{i}", prompt_of(first, 50, seed=i), temperature=0.9, seed=i, max_tokens=9) for i in (1, 2)]
    assert tokens(run(second, company[0], wanted, company[1]), "r") == alone
    assert len(set(alone)) > 3
    vllm_engines.take_back()


def test_what_it_cannot_do_is_refused_and_it_goes_on(vllm: Engine) -> None:
    with pytest.raises(InvalidRequest):
        vllm.add_request(ask("r", [VOCAB_SIZE]))
    assert run(vllm, ask("r", [5]))[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--enable-lora", "lora-modules"),
        ("--kv-cache-dtype foo", "kv-cache-dtype"),
    ],
)
def test_flags_that_would_break_the_handoff_are_refused_by_name(model: Path, flags: str, named: str) -> None:
    from services.engine.vllm import open_vllm

    with pytest.raises(SettingsError, match=named):
        open_vllm(EngineConfig(str(model), engine="vllm", device="cpu", engine_args=flags), ProofKey.public())


def test_a_layout_says_what_the_engine_is_and_another_is_refused_by_name(
    native: Engine, vllm: Engine, wider_model: Path, settings: dict[str, int]
) -> None:
    ours = vllm.layout
    said = (ours.engine, ours.dtype, ours.attention_backend, ours.block_size, ours.scales)
    assert said == ("vllm", "float32", "CPU_ATTN", 32, "")
    assert ours.kernel_layout.startswith("LHNC/")
    assert ours.isa
    others = VllmEngines(wider_model, **{**settings, "block_size": 64, "max_num_batched_tokens": 64}, dtype="bfloat16")
    other = others.make().layout
    with pytest.raises(IncompatibleLayout) as refusal:
        ours.check_compatible(other, "a peer")
    assert "block_size: ours 32, theirs 64" in str(refusal.value)
    assert "dtype: ours float32, theirs bfloat16" in str(refusal.value)
    for name in ("kernel_layout", "model_fingerprint"):  # how it packs that type; what the weights come to
        assert f"{name}: ours {getattr(ours, name)}, theirs {getattr(other, name)}" in str(refusal.value)
    for one, peer in ((native.layout, ours), (ours, native.layout)):
        with pytest.raises(IncompatibleLayout, match=f"engine: ours {one.engine}, theirs {peer.engine}"):
            one.check_compatible(peer, "a peer")


def test_every_block_of_a_prompt_is_written_and_kept(vllm: Engine) -> None:
    config = vllm._config  # type: ignore[attr-defined]
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is True
    assert getattr(config.cache_config, "swa_bounded_replay", False) is False
