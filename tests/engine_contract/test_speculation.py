"""Speculation by n-grams through vLLM's engine: several tokens a step, and the text that comes without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.block import BlockHash, ProofKey
from services.engine.api import Engine, FinishReason, InvalidRequest, RequestUpdate
from services.engine.config import EngineConfig
from services.engine.native import Engine as NativeEngine
from services.settings import SettingsError
from tests.engine_contract.test_engine_contract import ask, copy, prefill, reserve, run, tokens
from tests.engine_contract.test_vllm import alike
from tests.engine_contract.vllm_engines import DEVICE, VllmEngines

pytestmark = pytest.mark.vllm
if importlib.util.find_spec("vllm") is None:  # `make test` is free of it
    pytest.skip("vLLM is not installed", allow_module_level=True)

NGRAM = '--speculative-config \'{"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":2}\''
PROMPT = [5, 9, 77, 301] * 20  # of 80 tokens: two full blocks of 32 and a part
FEW = (5, 9, 77)
"""Tokens that may be said: so few that guesses come true."""


@pytest.fixture(scope="module")
def engines(wider_model: Path, settings: dict[str, int]) -> VllmEngines:
    per_token = ("block_size", "max_model_len", "max_num_batched_tokens")
    doubled = {name: value * (1 + (name in per_token)) for name, value in settings.items()}
    return VllmEngines(wider_model, engine_args=NGRAM, **doubled)


@pytest.fixture
def pair(engines: VllmEngines) -> Iterator[tuple[Engine, Engine]]:
    yield engines.make(), engines.make()
    engines.take_back()


@pytest.fixture(scope="module")
def native(wider_model: Path, settings: dict[str, int]) -> Engine:
    return NativeEngine.from_config(EngineConfig(str(wider_model), device="cpu", **settings))  # type: ignore[arg-type]


def most_at_once(updates: Sequence[RequestUpdate]) -> int:
    return max(len(update.new_tokens) for update in updates)


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": 41, "allowed_token_ids": FEW},
        {"max_tokens": 30},
        {"max_tokens": 20, "allowed_token_ids": FEW, "logprobs": 2},
        {"max_tokens": 60, "allowed_token_ids": FEW, "stop_token_ids": (77,), "min_tokens": 12},
        {"max_tokens": 20, "allowed_token_ids": (5, 9, 77, 301), "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    ],
)
def test_text_limits_and_log_probabilities_are_those_without_it(
    native: Engine, pair: tuple[Engine, Engine], sampling: dict[str, object]
) -> None:
    engine, _ = pair
    ours, theirs = (run(each, ask("r", PROMPT, **sampling)) for each in (native, engine))
    assert tokens(theirs, "r") == tokens(ours, "r")
    assert (theirs[-1].finish_reason, theirs[-1].stop_token_id) == (ours[-1].finish_reason, ours[-1].stop_token_id)
    pairs = [[token.logprobs for update in updates for token in update.new_tokens] for updates in (ours, theirs)]
    assert all(map(alike, *pairs))
    assert [update.num_output_tokens for update in theirs if update.new_tokens][-1] == len(tokens(ours, "r"))


def test_guesses_come_true_and_are_counted_and_are_no_prompt_tokens(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    updates = run(engine, ask("r", PROMPT, max_tokens=30, allowed_token_ids=FEW))
    stats = engine.stats
    assert most_at_once(updates) > 1
    assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens <= 3 * stats.num_drafts
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (len(PROMPT), 30)


def hand_over(first: Engine, second: Engine, **sampling: object) -> None:
    block_ids, updates = prefill(first, "r", PROMPT)
    request = ask("r", PROMPT, **sampling)
    reservation = reserve(second, request)
    assert len(reservation.block_ids) == len(block_ids)
    copy(first, block_ids, second, reservation.block_ids)
    proofs = [block.proof for update in updates for block in update.blocks]
    second.add_prefilled(request, reservation.block_ids, proofs, None)
    first.release_blocks(block_ids)


def test_a_handoff_a_move_and_a_resumption_go_on_as_if_undisturbed(native: Engine, pair: tuple[Engine, Engine]) -> None:
    first, second = pair
    sampling: dict[str, object] = {"max_tokens": 26, "allowed_token_ids": FEW}
    expected = tokens(run(native, ask("r", PROMPT, **sampling)), "r")
    hand_over(first, second, **sampling)
    updates: list[RequestUpdate] = []
    while most_at_once(updates or [RequestUpdate(ask("r", [1]), 0)]) < 2:  # with guesses pending
        updates += second.step().updates
    said = tokens(updates, "r")
    left = second.suspend("r", b"another transfer")
    assert left is not None
    assert left.num_output_tokens == len(said)
    # Moved: the newest token comes along.
    ids = [block.block_id for block in left.blocks]
    attempt = ask("moved", PROMPT, **sampling)
    moved = replace(attempt, resumed_token_ids=said[:-1])
    reservation = reserve(first, moved)
    assert len(reservation.block_ids) == len(ids)
    copy(second, ids, first, reservation.block_ids)
    newest = updates[-1].new_tokens[-1]
    first.add_prefilled(moved, reservation.block_ids, [block.proof for block in left.blocks], newest)
    second.release_blocks(ids)
    assert said + tokens(run(first), "moved") == expected
    # Resumed: computed again, all of it.
    resumed = replace(ask("resumed", PROMPT, **sampling), resumed_token_ids=said)
    assert said + tokens(run(second, resumed), "resumed") == expected


def test_guesses_in_company_and_under_preemption_change_nothing(native: Engine, pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    sampling: dict[str, object] = {"max_tokens": 24, "allowed_token_ids": FEW}
    prompts = {name: (PROMPT * 2)[i : i + 150] for i, name in enumerate(("r0", "r1"))}  # five blocks each, in ten
    room = engine.take_prefix([BlockHash(bytes([i]) * 16) for i in range(30)])
    assert room is not None
    updates = run(engine, *(ask(name, prompt, **sampling) for name, prompt in prompts.items()))
    engine.release_blocks(room.block_ids)
    assert engine.stats.num_preemptions
    for name, prompt in prompts.items():
        assert tokens(updates, name) == tokens(run(native, ask(name, prompt, **sampling)), name)


def test_what_vllm_cannot_guess_under_is_refused_by_name(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    for sampling in ({"min_p": 0.1, "temperature": 1.0}, {"logit_bias": {7: 1.0}}):
        with pytest.raises(InvalidRequest, match="speculative decoding"):
            engine.check(ask("r", PROMPT, **sampling))


def test_drawn_tokens_are_drawn_anew_at_each_place(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    updates = run(engine, ask("r", PROMPT, temperature=1.5, seed=3, max_tokens=40))
    assert updates[-1].finish_reason is FinishReason.LENGTH
    assert len(set(tokens(updates, "r"))) > 10


def test_a_draft_model_is_refused_by_name(wider_model: Path) -> None:
    from services.engine.vllm import open_vllm

    config = f'{{"model":"{wider_model}","method":"draft_model","num_speculative_tokens":2}}'
    flags = f"--speculative-config '{config}'"
    with pytest.raises(SettingsError, match="draft_model"):
        open_vllm(EngineConfig(str(wider_model), engine="vllm", device=DEVICE, engine_args=flags), ProofKey.public())
