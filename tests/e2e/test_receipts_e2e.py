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

pytestmark = pytest.mark.on_vllm


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


async def test_tokens_shared_inside_a_block_are_on_the_receipt(stack: Stack, engine: str) -> None:
    shared, tails = random_prompts([100], seed=51)[0], random_prompts([40, 45], seed=52)
    prompts = [[*shared, *tails[0]], [*shared, *tails[1]], [*shared[:50], 7, 7, 7]]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answers = [await complete(client, prompt) for prompt in prompts]
        _, foreign = await complete(client, prompts[1], cache_salt="somebody else")
    assert [tokens for tokens, _ in answers] == expected
    receipts = [receipt for _, receipt in answers]
    # The first two by the prefill worker, whose fourth block begins alike; the last where it is decoded, since 21
    # tokens after its first block are few: there, too, the second block begins alike. vLLM shares whole blocks.
    computed = [140, 45, 3] if engine == "native" else [140, 49, 21]
    assert [receipt["computed_tokens"] for receipt in receipts] == computed
    assert [receipt["prefilled_locally"] for receipt in receipts] == [False, False, True]
    assert foreign["computed_tokens"] == len(prompts[1]), "another salt shares nothing, not even inside a block"
    stack.check_clean()


async def test_who_samples_the_first_token_is_on_the_receipt(stack: Stack, engine: str) -> None:
    """vLLM's decode side does so by itself; the prefill worker's is held against it."""
    handed_off, local, said_at_once = random_prompts([140, 20, 150], seed=56)

    def num_compared() -> tuple[float, float]:
        series = "tandem:first_tokens_compared_total"
        return stack.metric("decode-0", series, outcome="equal"), stack.metric("decode-0", series, outcome="different")

    equal, different = num_compared()
    async with Client(stack, NUM_NEW_TOKENS) as client:
        (_, receipt), (_, of_local) = [await complete(client, prompt) for prompt in (handed_off, local)]
        tokens, of_last = await complete(client, said_at_once, max_tokens=1)
    # A first token that is the last is the prefill worker's: nothing is handed over, and nothing compared.
    assert tokens == reference_greedy(stack.model, [said_at_once], 1, ignore_eos=True)[0]
    assert (of_last["prefill_worker_id"], of_last["prefilled_locally"]) == ("prefill-0", False)
    assert of_last["handoff"] == {"blocks": 0, "bytes": 0, "first_token_equal": None}
    assert "step_alignment" not in of_last["stage_seconds"]
    is_compared = engine == "vllm"
    assert receipt["handoff"]["first_token_equal"] == (True if is_compared else None)
    assert of_local["handoff"]["first_token_equal"] is None
    assert ("step_alignment" in receipt["stage_seconds"]) == is_compared
    assert "step_alignment" not in of_local["stage_seconds"]
    assert num_compared() == (equal + is_compared, different)
    stack.check_clean()


async def test_the_workers_count_what_the_receipts_say(stack: Stack, engine: str) -> None:
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
    assert (grown["tandem:prefix_partial_hit_tokens_total"] > 0) == (engine == "native")
    stack.check_clean()
