"""Receipts of real workers: the prompt tokens that were reused, to the token, and as the workers count them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.stack import Stack

NUM_NEW_TOKENS = 4
BLOCK_TOKENS = 32
SERIES = (
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "tandem:prefix_partial_hit_tokens_total",
)


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Stack]:
    decode = ["--local-prefill-max-tokens 30"]
    with new_stack(model_of("qwen3"), "--num-gpu-blocks-override 256", prefill=[""], decode=decode) as stack:
        yield stack


async def complete(client: Client, prompt: list[int], **fields: object) -> tuple[list[int], dict[str, Any]]:
    """The tokens of the answer, and its receipt, which agrees with its usage."""
    answer = await client.complete(prompt, **fields)
    receipt = answer.receipt
    reused = receipt["reused_tokens"] + receipt["fetched_tokens"]
    assert answer.num_cached == reused == len(prompt) - receipt["computed_tokens"]
    return answer.tokens, receipt


def worker_counters(stack: Stack) -> Counter[str]:
    """The sum of each series over all workers."""
    workers = [name for name, service in stack.services.items() if service.role != "router"]
    return Counter({series: int(sum(stack.metric(name, series) for name in workers)) for series in SERIES})


async def test_tokens_shared_inside_a_block_are_on_the_receipt(stack: Stack) -> None:
    shared, tails = random_prompts([100], seed=51)[0], random_prompts([40, 45], seed=52)
    prompts = [[*shared, *tails[0]], [*shared, *tails[1]], [*shared[:50], 7, 7, 7]]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answers = [await complete(client, prompt) for prompt in prompts]
        _, foreign = await complete(client, prompts[1], cache_salt="somebody else")
    assert [tokens for tokens, _ in answers] == expected
    receipts = [receipt for _, receipt in answers]
    # The first two by the prefill worker, whose fourth block begins alike; the last where it is decoded, since 21
    # tokens after its first block are few: there, too, the second block begins alike.
    assert [receipt["computed_tokens"] for receipt in receipts] == [140, 45, 3]
    assert [receipt["prefilled_locally"] for receipt in receipts] == [False, False, True]
    assert foreign["computed_tokens"] == len(prompts[1]), "another salt shares nothing, not even inside a block"
    stack.check_clean()


async def test_the_workers_count_what_the_receipts_say(stack: Stack) -> None:
    """Prompts that share heads of any length, many at once, with two salts."""
    rng = random.Random(53)
    prompts = random_prompts([300], seed=54)
    for tail in random_prompts([rng.randint(1, 60) for _ in range(60)], seed=55):
        before = rng.choice(prompts)
        prompt = [*before[: rng.randint(1, len(before))], *tail]
        # One that ends with a block may be there as a whole, and then its last token is computed for its logits.
        prompts.append(prompt if len(prompt) % BLOCK_TOKENS else prompt[:-1])
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    before_counts = worker_counters(stack)
    limit = asyncio.Semaphore(12)

    async def run(client: Client, number: int) -> tuple[list[int], dict[str, Any]]:
        async with limit:
            return await complete(client, prompts[number], **({"cache_salt": "salt"} if number % 4 == 3 else {}))

    async with Client(stack, NUM_NEW_TOKENS) as client:
        answers = await asyncio.gather(*(run(client, number) for number in range(len(prompts))))
    assert [tokens for tokens, _ in answers] == expected
    grown = worker_counters(stack)
    grown.subtract(before_counts)
    receipts = [receipt for _, receipt in answers]
    cached = [receipt["reused_tokens"] + receipt["fetched_tokens"] for receipt in receipts]
    assert grown == {
        "vllm:prefix_cache_queries_total": sum(receipt["prompt_tokens"] for receipt in receipts),
        "vllm:prefix_cache_hits_total": sum(cached),
        "vllm:prompt_tokens_total": sum(receipt["computed_tokens"] for receipt in receipts),
        "tandem:prefix_partial_hit_tokens_total": sum(num_tokens % BLOCK_TOKENS for num_tokens in cached),
    }
    assert grown["tandem:prefix_partial_hit_tokens_total"] > 0
    stack.check_clean()
