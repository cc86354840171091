"""LoRA adapters through vLLM's engine: each says what the model with its weights in it says, with and without a
handoff, and no block of one is ever of use to another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.block import hash_blocks, namespace
from services.engine.api import Engine, InvalidRequest, Request
from services.engine.config import EngineConfig
from services.engine.native import Engine as NativeEngine
from tests.engine_contract.test_engine_contract import ask, copy, prompt_of, reserve, run, tokens
from tests.engine_contract.vllm_engines import VllmEngines
from tests.hf_models import merge_adapter, write_adapter

pytestmark = pytest.mark.vllm
if importlib.util.find_spec("vllm") is None:  # `make test` is free of it
    pytest.skip("vLLM is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def adapters(wider_model: Path) -> dict[str, Path]:
    return {
        name: write_adapter(wider_model.with_name(name), wider_model, seed=seed) for seed, name in enumerate(("a", "b"))
    }


@pytest.fixture(scope="module")
def engines(wider_model: Path, settings: dict[str, int], adapters: dict[str, Path]) -> VllmEngines:
    modules = tuple(f"{name}={path}" for name, path in adapters.items())
    per_token = ("block_size", "max_model_len", "max_num_batched_tokens")
    doubled = {name: value * (1 + (name in per_token)) for name, value in settings.items()}
    return VllmEngines(wider_model, lora_modules=modules, **doubled)


@pytest.fixture
def pair(engines: VllmEngines) -> Iterator[tuple[Engine, Engine]]:
    yield engines.make(), engines.make()
    engines.take_back()


def with_adapter(engine: Engine, name: str, request: Request) -> Request:
    request.adapter = next((key for key in engine.capabilities.adapters if key.startswith(f"{name}:")), "")
    return request


@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("name", ["a", "b", ""])
def test_a_handoff_with_an_adapter_says_what_the_merged_model_says(
    pair: tuple[Engine, Engine],
    adapters: dict[str, Path],
    wider_model: Path,
    settings: dict[str, int],
    tmp_path: Path,
    name: str,
    num_tokens: int,
) -> None:
    first, second = pair
    prompt = prompt_of(first, num_tokens)
    merged = merge_adapter(tmp_path / "merged", wider_model, adapters[name]) if name else wider_model
    native = NativeEngine.from_config(EngineConfig(str(merged), device="cpu", **settings))  # type: ignore[arg-type]
    expected = tokens(run(native, ask("r", prompt)), "r")
    assert tokens(run(first, with_adapter(first, name, ask("alone", prompt))), "alone") == expected

    updates = run(first, with_adapter(first, name, ask("r", prompt, hold_blocks=True)))
    block_ids = [block.block_id for update in updates for block in update.blocks]
    request = with_adapter(second, name, ask("r", prompt))
    reservation = reserve(second, request)
    copy(first, block_ids, second, reservation.block_ids)
    proofs = [block.proof for update in updates for block in update.blocks]
    second.add_prefilled(request, reservation.block_ids, proofs, None)
    first.release_blocks(block_ids)
    assert tokens(run(second), "r") == expected
    root = namespace(second.layout.model_fingerprint, "", request.adapter)
    hashes = hash_blocks(root, prompt, second.layout.block_size)
    assert [block.block_hash for update in updates for block in update.blocks][: len(hashes)] == hashes
    assert second.peek_prefix(hashes) == len(hashes)


def test_adapters_and_the_model_say_each_their_own_in_one_batch_and_share_no_block(pair: tuple[Engine, Engine]) -> None:
    first, second = pair
    prompt = prompt_of(first, 70)
    alone = {
        name: tokens(run(first, with_adapter(first, name, ask(name or "base", prompt))), name or "base")
        for name in ("a", "b", "")
    }
    assert len(set(map(tuple, alone.values()))) == 3
    updates = run(second, *[with_adapter(second, name, ask(name or "base", prompt)) for name in ("a", "b", "")])
    assert {name: tokens(updates, name or "base") for name in alone} == alone
    assert {update.num_cached_tokens for update in updates} == {0}


def test_an_unknown_adapter_is_refused_and_so_are_the_files_of_another(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    for key in ("c:00", "a:0011223344556677", "a"):
        request = ask("r", [5])
        request.adapter = key
        with pytest.raises(InvalidRequest, match="is not here; there are a:"):
            engine.check(request)


def test_a_resumed_request_goes_on_with_its_adapter(pair: tuple[Engine, Engine]) -> None:
    first, second = pair
    prompt = prompt_of(first, 20)
    whole = tokens(run(first, with_adapter(first, "b", ask("whole", prompt))), "whole")
    resumed = with_adapter(second, "b", ask("resumed", prompt))
    resumed.resumed_token_ids = whole[:3]
    assert tokens(run(second, resumed), "resumed") == whole[3:]
