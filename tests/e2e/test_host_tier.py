"""What a small paged cache evicts comes back from main memory: to the worker itself, and to others over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.block import BlockHash
from kvstore.index import IndexReader, Tier
from kvstore.index.entries import Holding
from tests.completions import Answer, Client
from tests.hf_models import random_prompts, reference_greedy
from tests.orders import Orders
from tests.stack import Stack

# 41 blocks of 32 tokens: room for one prompt of 1,000 tokens, and for no second one beside it.
NUM_BLOCKS = 41
SHARED_BLOCKS = 30
NUM_NEW_TOKENS = 8

pytestmark = pytest.mark.over("nixl")


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path], transport: str) -> Iterator[Stack]:
    worker = f"--kv-transport {transport} --num-gpu-blocks-override {NUM_BLOCKS} --max-model-len 1200"
    worker += " --prefix-fetch always --prefix-fetch-timeout-s 30 --kv-offloading-size 0.05"
    # Every request goes to the next worker: what one needs, the other has.
    router = "--routing-policy round-robin --index-timeout 5"
    decode = ["--local-prefill-max-tokens 0"] * 2
    with new_stack(model_of("qwen2"), worker, prefill=["", ""], decode=decode, router=router) as stack:
        yield stack


def num_kept(stack: Stack, name: str) -> int:
    state = stack.debug_state(name)["host_tier"]
    assert isinstance(state, dict)
    return int(state["num_blocks"])


async def evict(stack: Stack, orders: Orders, decode: str, prefill: str, seed: int) -> None:
    """Have the workers serve another prompt that takes all their blocks, and wait until the evicted ones are kept."""
    before = num_kept(stack, prefill)
    await orders.generate(random_prompts([1150], seed=seed)[0], decode, prefill, [])
    stack.wait_for(lambda: num_kept(stack, prefill) > before, f"{prefill} to keep what it evicted")


async def test_an_evicted_prefix_is_a_local_hit_and_a_hit_of_other_workers(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    shared, tails = random_prompts([SHARED_BLOCKS * 32], seed=61)[0], random_prompts([40] * 3, seed=62)
    prompts = [shared + tail for tail in tails]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)

    tokens, usage = await orders.generate(prompts[0], "decode-0", "prefill-0", [])
    assert (tokens, usage.num_cached_tokens) == (expected[0], 0)
    await evict(stack, orders, "decode-0", "prefill-0", seed=63)

    # By the worker itself.
    hits = stack.metric("prefill-0", "tandem:host_tier_hits_total")
    tokens, usage = await orders.generate(prompts[1], "decode-0", "prefill-0", [])
    assert (tokens, usage.num_cached_tokens, len(usage.fetched)) == (expected[1], len(shared), 0)
    assert stack.metric("prefill-0", "tandem:host_tier_hits_total") > hits
    await evict(stack, orders, "decode-0", "prefill-0", seed=64)

    # By another one.
    hits = stack.metric("prefill-0", "tandem:host_tier_hits_total")
    source = orders.source("prefill-0", SHARED_BLOCKS, tier="host")
    tokens, usage = await orders.generate(prompts[2], "decode-1", "prefill-1", [source])
    assert (tokens, usage.num_cached_tokens) == (expected[2], len(shared))
    (part,) = usage.fetched
    assert (part.holder_id, part.tier, part.num_blocks) == ("prefill-0", "host", SHARED_BLOCKS)
    assert stack.metric("prefill-0", "tandem:host_tier_hits_total") > hits
    assert stack.metric("prefill-0", "tandem:host_tier_corrupt_total") == 0
    stack.check_clean()


async def test_the_router_finds_in_the_index_what_only_main_memory_has(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    shared, tails = random_prompts([SHARED_BLOCKS * 32], seed=91)[0], random_prompts([40] * 2, seed=92)
    prompts = [shared + tail for tail in tails]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    answers: list[Answer] = []
    async with Client(stack, NUM_NEW_TOKENS) as client:
        for prompt in prompts:
            answers.append(await client.complete(prompt))
            receipt = answers[-1].receipt
            await evict(stack, orders, receipt["decode_worker_id"], receipt["prefill_worker_id"], seed=93)
            await asyncio.to_thread(stack.wait_index_follows)
    assert [answer.tokens for answer in answers] == expected
    cold, warm = answers
    assert cold.num_cached == 0
    assert warm.num_cached >= len(shared)
    assert [part["tier"] for part in warm.receipt["fetched"]] == ["host"], warm
    stack.check_clean()


async def test_a_decode_worker_finds_its_own_evicted_blocks_those_it_generated_too(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    prompt = random_prompts([1023 - NUM_NEW_TOKENS], seed=70)[0]
    tokens, usage = await orders.generate(prompt, "decode-1", None, [])
    assert (tokens, usage.prefilled_locally) == (
        reference_greedy(stack.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0],
        True,
    )
    before = num_kept(stack, "decode-1")
    await orders.generate(random_prompts([1150], seed=71)[0], "decode-1", None, [])
    stack.wait_for(lambda: num_kept(stack, "decode-1") > before, "decode-1 to keep what it evicted")
    turn = [*prompt, *tokens, *random_prompts([30], seed=72)[0]]
    next_tokens, usage = await orders.generate(turn, "decode-1", None, [])
    assert next_tokens == reference_greedy(stack.model, [turn], NUM_NEW_TOKENS, ignore_eos=True)[0]
    assert usage.num_cached_tokens >= 992
    stack.check_clean()


async def test_many_prompts_over_a_pool_that_holds_few_lose_neither_tokens_nor_blocks(
    stack: Stack,
) -> None:
    shared, tails = random_prompts([480] * 4, seed=73), random_prompts([20] * 6, seed=74)
    prompts = [prefix + tail for tail in tails for prefix in shared]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answers = await asyncio.gather(*(client.complete(prompt) for prompt in prompts))
    assert [answer.tokens for answer in answers] == expected
    stack.check_clean()


async def test_the_router_learns_from_the_index_what_is_in_main_memory(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    prompt = random_prompts([1000], seed=65)[0]
    expected = reference_greedy(stack.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    await orders.generate(prompt, "decode-0", "prefill-0", [])
    await evict(stack, orders, "decode-0", "prefill-0", seed=66)
    held = await until_in_index(stack, orders.hashes(prompt), "prefill-0", num_blocks=31)
    assert held.num_per_tier[Tier.HOST] > 0
    assert held.num_per_tier[Tier.DEVICE] + held.num_per_tier[Tier.HOST] == 31
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answer = await client.complete(prompt)
    assert answer.tokens == expected
    assert answer.num_cached >= 31 * 32, answer
    stack.check_clean()


async def until_in_index(stack: Stack, hashes: list[BlockHash], holder_id: str, num_blocks: int) -> Holding:
    """What the index says of the holder, once that is so many blocks."""
    reader = IndexReader(stack.redis.url)
    await reader.start()
    found: list[Holding] = []
    try:
        async with asyncio.timeout(30):
            while not any((held.holder_id, held.num_blocks) == (holder_id, num_blocks) for held in found):
                await asyncio.sleep(0.05)
                found = await reader.lookup(hashes, timeout_s=5)
    finally:
        await reader.close()
    return next(held for held in found if held.holder_id == holder_id)
