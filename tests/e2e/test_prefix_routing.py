"""Prefixes shared across replicas, through the router: who computes what, and that the tokens do not care."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.stack import Stack

NUM_NEW_TOKENS = 8
BLOCK_TOKENS = 32

pytestmark = pytest.mark.on_vllm(slow=True)


Start = Callable[[str], Stack]


@pytest.fixture(scope="module")
def start(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Start:
    """Makes a stack with that routing policy."""
    # What is tested is that prefixes are shared, not whether that pays for a model this small on a machine this busy.
    worker = "--num-gpu-blocks-override 512 --prefix-fetch always --prefix-fetch-timeout-s 30"
    workers = {"worker": worker, "prefill": ["", ""], "decode": ["--local-prefill-max-tokens 16"] * 2}
    return lambda policy: new_stack(
        model_of("llama3"), router=f"--routing-policy {policy} --index-timeout 5", **workers
    )


@pytest.fixture(scope="module")
def spread(start: Start) -> Iterator[Stack]:
    """Every request goes to the next worker: what one needs, the other has."""
    with start("round-robin") as stack:
        yield stack


@pytest.fixture(scope="module")
def routed(start: Start) -> Iterator[Stack]:
    with start("kv") as stack:
        yield stack


def num_computed_tokens(stack: Stack) -> float:
    """Prompt tokens that all workers have computed."""
    workers = [name for name, service in stack.services.items() if service.role != "router"]
    return sum(stack.metric(name, "vllm:prompt_tokens_total") for name in workers)


async def test_a_prefix_computed_on_one_replica_is_a_hit_on_every_other(spread: Stack) -> None:
    shared, tails = random_prompts([1500], seed=41)[0], random_prompts([30] * 5, seed=42)
    prompts = [shared + tail for tail in tails]
    expected = reference_greedy(spread.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(spread, NUM_NEW_TOKENS) as client:
        answers = []
        for prompt in prompts:
            answers.append(await client.complete(prompt))
            await asyncio.to_thread(spread.wait_index_follows)
    assert [answer.tokens for answer in answers] == expected
    num_shared = len(shared) // BLOCK_TOKENS * BLOCK_TOKENS
    assert answers[0].num_cached == 0
    assert all(answer.num_cached >= num_shared for answer in answers[1:]), [answer.num_cached for answer in answers]
    assert any(answer.receipt["fetched"] for answer in answers[1:]), "nothing was fetched from a peer"
    spread.check_clean()


async def test_the_router_reckons_with_what_prefill_workers_have_learnt_of_their_speed(spread: Stack) -> None:
    async with Client(spread, NUM_NEW_TOKENS) as client:
        for prompt in random_prompts([400] * 4, seed=49):
            request_id = str((await client.complete(prompt)).content["id"]).removeprefix("cmpl-")
        (decision,) = (await client.http.get(f"/debug/routing/{request_id}")).json()["decisions"]
    assert decision["rates"]["num_steps"] > 0
    assert decision["rates"]["spread"] < 1


async def test_each_turn_of_a_chat_computes_only_what_is_new(spread: Stack) -> None:
    history: list[int] = []
    async with Client(spread, NUM_NEW_TOKENS) as client:
        for turn, question in enumerate(random_prompts([150] * 8, seed=43)):
            prompt = history + question
            answer = await client.complete(prompt)
            expected = reference_greedy(spread.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
            assert answer.tokens == expected, f"turn {turn}"
            # All but the last generated token of the turn before has its KV; a block is shared once it is full.
            num_known = max(0, len(history) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            assert answer.num_cached >= num_known, f"turn {turn}, {num_known} known: {answer}"
            history = prompt + expected
            await asyncio.to_thread(spread.wait_index_follows)
    spread.check_clean()


async def test_equal_cold_prompts_at_once_are_computed_once(routed: Stack) -> None:
    prompt = random_prompts([1500], seed=44)[0]
    expected = reference_greedy(routed.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    before = num_computed_tokens(routed)
    async with Client(routed, NUM_NEW_TOKENS) as client:
        answers = await asyncio.gather(*(client.complete(prompt) for _ in range(32)))
    assert all(answer.tokens == expected for answer in answers)
    computed = num_computed_tokens(routed) - before
    assert computed <= len(prompt) + 31 * BLOCK_TOKENS, f"{computed} prompt tokens computed for {len(prompt)}"
    routed.check_clean()


async def test_every_decision_can_be_explained(routed: Stack) -> None:
    async with Client(routed, NUM_NEW_TOKENS) as client:
        body = {"model": "m", "prompt": random_prompts([100], seed=47)[0], "max_tokens": 2}
        response = await client.http.post("/v1/completions", json=body, headers={"X-Request-Id": "explain-me"})
        assert response.status_code == 200
        explained = (await client.http.get("/debug/routing/explain-me")).json()
    assert "prefill-0" in str(explained)
    assert "decode-1" in str(explained)
