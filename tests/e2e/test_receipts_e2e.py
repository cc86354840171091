"""Receipts of real workers: the prompt tokens that were reused, to the token, and as the workers count them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hf_models import random_prompts, reference_greedy, write_model
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
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("receipts") / "model", "qwen3")


@pytest.fixture(scope="module")
def stack(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    worker = ["--model", str(model), "--served-model-name", "m", "--num-gpu-blocks-override", "256"]
    decode = ["--local-prefill-max-tokens", "30"]
    with Stack(tmp_path_factory.mktemp("stack"), [()], [decode], worker=worker) as stack:
        yield stack


async def complete(client: httpx.AsyncClient, prompt: list[int], **fields: object) -> tuple[list[int], dict[str, Any]]:
    """The tokens of the answer, and its receipt, which agrees with its usage."""
    body = {"model": "m", "prompt": prompt, "max_tokens": NUM_NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json={**body, "return_token_ids": True, "receipt": True, **fields})
    assert response.status_code == 200, response.text
    answer = response.json()
    (receipt,) = answer["receipt"]["sequences"]
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == receipt["reused_tokens"] + receipt["fetched_tokens"] == len(prompt) - receipt["computed_tokens"]
    return answer["choices"][0]["token_ids"], receipt


def worker_counters(stack: Stack) -> Counter[str]:
    """The sum of each series over all workers."""
    counters: Counter[str] = Counter()
    for service in stack.services.values():
        if service.role != "router":
            for line in stack.metrics(service.name).splitlines():
                name = line.split("{")[0]
                if name in SERIES:
                    counters[name] += int(float(line.split()[-1]))
    return counters


def client_of(stack: Stack) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=stack.url, timeout=120)


async def test_tokens_shared_inside_a_block_are_on_the_receipt(model: Path, stack: Stack) -> None:
    shared, tails = random_prompts([100], seed=51)[0], random_prompts([40, 45], seed=52)
    prompts = [[*shared, *tails[0]], [*shared, *tails[1]], [*shared[:50], 7, 7, 7]]
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with client_of(stack) as client:
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


async def test_the_workers_count_what_the_receipts_say(model: Path, stack: Stack) -> None:
    """Prompts that share heads of any length, many at once, with two salts."""
    rng = random.Random(53)
    prompts = random_prompts([300], seed=54)
    for tail in random_prompts([rng.randint(1, 60) for _ in range(60)], seed=55):
        before = rng.choice(prompts)
        prompt = [*before[: rng.randint(1, len(before))], *tail]
        # One that ends with a block may be there as a whole, and then its last token is computed for its logits.
        prompts.append(prompt if len(prompt) % BLOCK_TOKENS else prompt[:-1])
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    before_counts = worker_counters(stack)
    limit = asyncio.Semaphore(12)

    async def run(client: httpx.AsyncClient, number: int) -> tuple[list[int], dict[str, Any]]:
        async with limit:
            return await complete(client, prompts[number], **({"cache_salt": "salt"} if number % 4 == 3 else {}))

    async with client_of(stack) as client:
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
