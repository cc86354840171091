"""What workers computed outlives them: a store node lends it from its memory, and after its own restart from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvstore.index import Tier
from tests.hf_models import random_prompts, reference_greedy, write_model
from tests.index_view import until_held
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 40
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module", params=["ucxx", "nixl"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Stack]]:
    directory = tmp_path_factory.mktemp(f"store-{request.param}")
    model = write_model(directory / "model", "qwen2")
    transport = ["--kv-transport", request.param]
    worker = ["--model", str(model), "--served-model-name", "m", "--num-gpu-blocks-override", "256", *transport]
    worker += ["--prefix-fetch", "always", "--prefix-fetch-timeout-s", "30"]
    store = [*transport, "--store-dram-bytes", "64MiB", "--store-disk-dir", str(directory / "disk")]
    store += ["--store-disk-bytes", "64MiB", "--log-level", "debug", "--log-format", "json"]
    decode = ["--local-prefill-max-tokens", "0"]
    router = ["--index-timeout", "5"]
    with Stack(directory / "logs", [(), ()], [decode] * 2, store=[store], router=router, worker=worker) as stack:
        yield model, stack


def num_kept(stack: Stack, tier: str) -> int:
    found = stack.debug_state("store-0")[tier]
    assert isinstance(found, dict)
    return int(found["num_blocks"])


async def test_a_prefix_is_a_hit_on_every_replica_whoever_of_them_has_it_and_wherever(
    served: tuple[Path, Stack],
) -> None:
    model, stack = served
    orders = Orders(stack, NUM_NEW_TOKENS)
    (shared,), tails = random_prompts([1500], seed=51), random_prompts([30] * 12, seed=53)
    num_shared = len(shared) // 32
    prompts = [shared + tail for tail in tails]
    answers = dict(
        zip(map(tuple, prompts), reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True), strict=True)
    )

    async def is_fetched(decode: str, prefill: str | None, holder: str, tier: str) -> None:
        """Whoever prefills has nothing of the prefix and takes it from `holder`."""
        prompt = prompts.pop()
        source = orders.source(holder, num_shared, tier)
        tokens, usage = await orders.generate(prompt, decode, prefill, [source])
        assert tokens == answers[tuple(prompt)]
        (part,) = usage.fetched
        assert (part.holder_id, part.tier, part.num_blocks) == (holder, tier, num_shared)
        assert usage.num_cached_tokens == num_shared * 32

    first = prompts.pop()
    tokens, usage = await orders.generate(first, "decode-0", None, [])
    assert (tokens, usage.num_cached_tokens) == (answers[tuple(first)], 0)
    await is_fetched("decode-1", None, "decode-0", "device")
    await is_fetched("decode-0", "prefill-0", "decode-1", "device")
    await is_fetched("decode-1", "prefill-1", "prefill-0", "device")
    # Blocks that decode workers computed are kept, too; each prompt is known for a block or two beyond the prefix.
    num_all = num_shared + 4 * ((len(first) + NUM_NEW_TOKENS - 1) // 32 - num_shared)
    stack.wait_for(lambda: num_kept(stack, "disk") == num_all, "the store to have all blocks in memory and on disk")
    assert num_kept(stack, "dram") == num_all

    for tier, restarted in (("store", WORKERS), ("disk", (*WORKERS, "store-0"))):
        stack.restart(*restarted)
        assert (num_kept(stack, "dram") > 0, num_kept(stack, "disk") >= num_all) == (tier == "store", True)
        await is_fetched("decode-0", None, "store-0", tier)
        await is_fetched("decode-1", None, "store-0", tier)
        await is_fetched("decode-0", "prefill-0", "store-0", tier)
        await is_fetched("decode-1", "prefill-1", "store-0", tier)
    stack.wait_for(lambda: num_lent(stack) == 0, "the store to have its blocks back")
    assert orders.were_lent_for_ours("store-0")
    stack.check_clean()


def num_lent(stack: Stack) -> object:
    return stack.debug_state("store-0")["num_lent_blocks"]


async def test_the_router_finds_in_the_index_what_only_the_store_has(served: tuple[Path, Stack]) -> None:
    model, stack = served
    prompt = random_prompts([700], seed=52)[0]
    expected = reference_greedy(model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    assert await ask(stack, prompt) == (expected, 0)
    await until_held(stack, Orders(stack, NUM_NEW_TOKENS).hashes(prompt), "store-0", Tier.STORE)
    stack.restart(*WORKERS)
    stack.wait_ready()
    tokens, num_cached = await ask(stack, prompt)
    assert tokens == expected
    assert num_cached == len(prompt) // 32 * 32


async def ask(stack: Stack, prompt: list[int]) -> tuple[list[int], int]:
    """One completion through the router: its token ids, and how many of the prompt were not computed."""
    body = {"model": "m", "prompt": prompt, "max_tokens": NUM_NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60) as client:
        response = await client.post(f"{stack.url}/v1/completions", json=body | {"return_token_ids": True})
    response.raise_for_status()
    answer = response.json()
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]
