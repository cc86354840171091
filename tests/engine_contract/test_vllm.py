"""What is asked of vLLM behind the port beside what every engine does: that it agrees with our own engine."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from math import isclose
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from kvstore.block import ProofKey
from kvstore.errors import IncompatibleLayout
from services.engine.api import Engine, FinishReason, InvalidRequest, PositionLogprobs, RequestUpdate
from services.engine.config import EngineConfig
from services.engine.foreign import Kept, RankCache
from services.engine.native import Engine as NativeEngine
from services.settings import SettingsError
from tests.engine_contract.test_engine_contract import ask, check_handoff, prompt_of, run, tokens
from tests.engine_contract.vllm_engines import BACKEND, DEVICE, VllmEngines
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


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU vLLM compiles what samples, before it serves")
def test_a_first_request_with_log_probabilities_compiles_nothing(vllm: Engine) -> None:
    """Which takes seconds in the midst of a step, and a compiler, without which the engine would end."""
    torch._dynamo.reset()  # what the tests before have had compiled
    before = {name: dict(counts) for name, counts in counters.items()}
    run(vllm, ask("r", prompt_of(vllm, 40), temperature=0.9, logprobs=3, prompt_logprobs=2))
    assert {name: dict(counts) for name, counts in counters.items()} == before


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
        ('--kv-transfer-config \'{"kv_connector":"NixlConnector","kv_role":"kv_both"}\'', "kv-transfer-config"),
        ("--async-scheduling", "async-scheduling"),
        ("--kv-sharing-fast-prefill", "kv-sharing-fast-prefill"),
        ("--pipeline-parallel-size 2", "pipeline-parallel-size"),
    ],
)
def test_flags_that_would_break_the_handoff_are_refused_by_name(model: Path, flags: str, named: str) -> None:
    with pytest.raises(SettingsError, match=f"{named} is refused: "):
        EngineConfig(str(model), engine="vllm", device=DEVICE, engine_args=flags)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"engine_args": "--enable-lora"}, "lora-modules"), ({"kv_cache_dtype": "foo"}, "kv-cache-dtype")],
)
def test_flags_that_vllm_could_not_run_with_are_refused_by_name(
    model: Path, settings: dict[str, str], named: str
) -> None:
    from services.engine.vllm import open_vllm

    config = EngineConfig(str(model), engine="vllm", device=DEVICE, **settings)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=named):
        open_vllm(config, ProofKey.public())


def test_a_layout_says_what_the_engine_is_and_another_is_refused_by_name(
    native: Engine, vllm: Engine, wider_model: Path, settings: dict[str, int]
) -> None:
    ours = vllm.layout
    said = (ours.engine, ours.dtype, ours.attention_backend, ours.block_size, ours.scales)
    assert said == ("vllm", "float32", BACKEND, 32, "")
    assert re.fullmatch(r"[LHNC]{4}/[0-9a-f]{16}" if DEVICE == "cuda" else r"LHNC/[0-9a-f]{16}", ours.kernel_layout)
    assert bool(ours.isa) == (DEVICE == "cpu")
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


HAS_FP8 = DEVICE == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.mark.skipif(not HAS_FP8, reason="vLLM's caches of fp8 need AVX-512")
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_a_cache_of_fp8_is_handed_over_as_it_is_and_to_none_that_has_another(
    vllm: Engine, wider_model: Path, settings: dict[str, int], dtype: str
) -> None:
    per_token = ("block_size", "max_model_len", "max_num_batched_tokens")
    doubled = {name: value * (1 + (name in per_token)) for name, value in settings.items()}
    engines = VllmEngines(wider_model, kv_cache_dtype=dtype, **doubled)
    source, target, alone = engines.make(), engines.make(), engines.make()
    assert source.layout == target.layout
    told = {}
    for num_tokens in (1, 17, 90):
        told[num_tokens] = check_handoff(source, target, num_tokens)  # as without a handoff
        prompt = prompt_of(alone, num_tokens, seed=num_tokens)
        assert told[num_tokens] == tokens(run(alone, ask("r", prompt)), "r")
    plain = {
        num_tokens: tokens(run(vllm, ask("r", prompt_of(vllm, num_tokens, seed=num_tokens))), "r")
        for num_tokens in told
    }
    assert told != plain, "nothing is computed in fp8"
    for one, peer in ((vllm.layout, source.layout), (source.layout, vllm.layout)):
        with pytest.raises(IncompatibleLayout) as refusal:
            one.check_compatible(peer, "a peer")
        for name in ("dtype", "scales", "kernel_layout"):
            ours, theirs = (getattr(each, name) or "(none)" for each in (one, peer))
            assert f"{name}: ours {ours}, theirs {theirs}" in str(refusal.value)
    engines.take_back()


class _Layer:
    """What an attention layer of vLLM's says of itself."""

    def __init__(self, scales: tuple[float, float] = (1.0, 1.0), *, is_batch_invariant: bool = True) -> None:
        self._k_scale_float, self._v_scale_float = scales
        self.impl = SimpleNamespace(isa="vec")
        self._is_batch_invariant = is_batch_invariant

    def get_attn_backend(self) -> SimpleNamespace:
        return SimpleNamespace(get_name=lambda: "SOME_ATTN", supports_batch_invariance=lambda: self._is_batch_invariant)


def said_of(cache_dtype: str, *layers: _Layer) -> RankCache:
    from services.engine.vllm.layout import rank_cache

    config: Any = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=cache_dtype))
    return rank_cache(config, {f"layer {i}": layer for i, layer in enumerate(layers)}, "0123456789abcdef")


def test_a_latent_is_written_to_a_cache_as_its_layer_has_it() -> None:
    """vLLM gives a connector the axis of the one head, too, which layers do without, and their kernels refuse."""
    from services.engine.vllm.layout import write

    shapes: list[tuple[int, ...]] = []
    layer: Any = SimpleNamespace(kv_lora_rank=6, kv_cache_dtype="auto", _k_scale=None)
    layer.impl = SimpleNamespace(
        do_kv_cache_update=lambda *given: shapes.extend(tuple(each.shape) for each in given[:3])
    )
    kept = Kept(1, 1, 16, 1, 8, torch.float32, is_head_major=True)
    write(torch.zeros(4, 1, 16, 8), layer, kept, torch.zeros(16, 1, 8), torch.arange(16))
    assert shapes == [(16, 6), (16, 1, 2), (4, 16, 8)]


def test_scales_are_said_of_fp8_alone_and_by_every_layer() -> None:
    plain, scaled = _Layer(), _Layer((0.5, 1.0))
    assert said_of("auto", scaled, scaled).scales == ""
    digests = [said_of("fp8_e4m3", *layers).scales for layers in ((plain, plain), (plain, scaled), (scaled, plain))]
    assert len(set(digests)) == 3
    assert digests[1] == said_of("fp8", _Layer(), _Layer((0.5, 1.0))).scales


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("is_able", [(True, True), (True, False)])
def test_sums_are_said_to_be_batch_invariant_where_all_layers_are_and_it_was_asked_for(
    vllm: Engine, monkeypatch: pytest.MonkeyPatch, is_set: bool, is_able: tuple[bool, bool]
) -> None:
    from services.engine.vllm import layout
    from services.engine.vllm.opening import _numerics

    monkeypatch.setattr(layout, "envs", SimpleNamespace(VLLM_BATCH_INVARIANT=is_set))  # vLLM reads each but once
    said = said_of("auto", *(_Layer(is_batch_invariant=each) for each in is_able))
    assert said.is_batch_invariant == (is_set and all(is_able))
    config = vllm._config  # type: ignore[attr-defined]
    name = _numerics(config, vllm.layout, is_batch_invariant=said.is_batch_invariant)
    assert name == vllm.capabilities.numerics + "/batch-invariant" * said.is_batch_invariant


def test_a_request_that_vllm_ends_before_its_time_gets_an_error_and_the_engine_goes_on(
    vllm: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for stop tokens before it counts the least tokens, and where no logit is a number it may draw one."""
    scheduler = vllm._scheduler  # type: ignore[attr-defined]
    update = scheduler.update_from_output

    def drawing_a_seven(step: Any, output: Any) -> Any:
        for drawn in output.sampled_token_ids:
            drawn[:] = [7] * len(drawn)
        return update(step, output)

    with monkeypatch.context() as poisoned:
        poisoned.setattr(scheduler, "update_from_output", drawing_a_seven)
        updates = run(vllm, ask("r", [5, 6], stop_token_ids=(7,), min_tokens=4))
    assert (updates[-1].finish_reason, updates[-1].failure) == (FinishReason.ERROR, "vLLM ended it with an error")
    assert run(vllm, ask("next", [5, 6]))[-1].finish_reason is FinishReason.LENGTH
