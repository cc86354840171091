"""Prefixes shared across replicas, through the router: who computes what, and that the tokens do not care."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hf_models import random_prompts, reference_greedy, write_model
from tests.stack import Stack

NUM_NEW_TOKENS = 8
BLOCK_TOKENS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("routing") / "model", "llama3")


def start(directory: Path, model: Path, policy: str) -> Stack:
    worker = ["--model", str(model), "--served-model-name", "m", "--num-gpu-blocks-override", "512"]
    # What is tested is that prefixes are shared, not whether that pays for a model this small on a machine this busy.
    worker += ["--prefix-fetch", "always", "--prefix-fetch-timeout-s", "30"]
    decode = ["--local-prefill-max-tokens", "16"]
    return Stack(
        directory,
        [(), ()],
        [decode, decode],
        router=["--routing-policy", policy, "--index-timeout", "5"],
        worker=worker,
    )


@pytest.fixture(scope="module")
def spread(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Every request goes to the next worker: what one needs, the other has."""
    with start(tmp_path_factory.mktemp("round-robin"), model, "round-robin") as stack:
        yield stack


@pytest.fixture(scope="module")
def routed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with start(tmp_path_factory.mktemp("kv"), model, "kv") as stack:
        yield stack


async def complete(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": NUM_NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json={**body, "return_token_ids": True, "receipt": True})
    assert response.status_code == 200, response.text
    return dict(response.json())


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


def cached_of(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def client_of(stack: Stack) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=stack.url, timeout=60, limits=httpx.Limits(max_connections=64))


def num_computed_tokens(stack: Stack) -> int:
    """Prompt tokens that all workers have computed."""
    total = 0
    for service in stack.services.values():
        if service.role != "router":
            for line in stack.metrics(service.name).splitlines():
                if line.startswith("vllm:prompt_tokens_total{"):
                    total += int(float(line.split()[-1]))
    return total


async def test_a_prefix_computed_on_one_replica_is_a_hit_on_every_other(model: Path, spread: Stack) -> None:
    shared, tails = random_prompts([1500], seed=41)[0], random_prompts([30] * 5, seed=42)
    prompts = [shared + tail for tail in tails]
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with client_of(spread) as client:
        answers = []
        for prompt in prompts:
            answers.append(await complete(client, prompt))
            await asyncio.to_thread(spread.wait_index_follows)
    assert [tokens_of(answer) for answer in answers] == expected
    num_shared = len(shared) // BLOCK_TOKENS * BLOCK_TOKENS
    assert cached_of(answers[0]) == 0
    assert all(cached_of(answer) >= num_shared for answer in answers[1:]), [cached_of(answer) for answer in answers]
    assert any(any(part["fetched"] for part in answer["receipt"]["sequences"]) for answer in answers[1:]), (
        "nothing was fetched from a peer"
    )
    spread.check_clean()


async def test_the_router_reckons_with_what_prefill_workers_have_learnt_of_their_speed(spread: Stack) -> None:
    async with client_of(spread) as client:
        for prompt in random_prompts([400] * 4, seed=49):
            request_id = str((await complete(client, prompt))["id"])
        (decision,) = (await client.get(f"/debug/routing/{request_id.removeprefix('cmpl-')}")).json()["decisions"]
    assert decision["rates"]["num_steps"] > 0
    assert decision["rates"]["spread"] < 1


async def test_each_turn_of_a_chat_computes_only_what_is_new(model: Path, spread: Stack) -> None:
    history: list[int] = []
    async with client_of(spread) as client:
        for turn, question in enumerate(random_prompts([150] * 8, seed=43)):
            prompt = history + question
            answer = await complete(client, prompt)
            expected = reference_greedy(model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
            assert tokens_of(answer) == expected, f"turn {turn}"
            # All but the last generated token of the turn before has its KV; a block is shared once it is full.
            num_known = max(0, len(history) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            assert cached_of(answer) >= num_known, (
                f"turn {turn}, {num_known} known: {answer['usage']} {answer['receipt']}"
            )
            history = prompt + expected
            await asyncio.to_thread(spread.wait_index_follows)
    spread.check_clean()


async def test_equal_cold_prompts_at_once_are_computed_once(model: Path, routed: Stack) -> None:
    prompt = random_prompts([1500], seed=44)[0]
    expected = reference_greedy(model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    before = num_computed_tokens(routed)
    async with client_of(routed) as client:
        answers = await asyncio.gather(*(complete(client, prompt) for _ in range(32)))
    assert all(tokens_of(answer) == expected for answer in answers)
    computed = num_computed_tokens(routed) - before
    assert computed <= len(prompt) + 31 * BLOCK_TOKENS, f"{computed} prompt tokens computed for {len(prompt)}"
    routed.check_clean()


async def test_every_decision_can_be_explained(routed: Stack) -> None:
    async with client_of(routed) as client:
        body = {"model": "m", "prompt": random_prompts([100], seed=47)[0], "max_tokens": 2}
        response = await client.post("/v1/completions", json=body, headers={"X-Request-Id": "explain-me"})
        assert response.status_code == 200
        explained = (await client.get("/debug/routing/explain-me")).json()
    assert "prefill-0" in str(explained)
    assert "decode-1" in str(explained)
