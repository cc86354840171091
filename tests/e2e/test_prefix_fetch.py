"""A prefix that another worker holds is pulled instead of computed, and the tokens are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hf_models import random_prompts, reference_greedy
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 8

pytestmark = [pytest.mark.on_vllm, pytest.mark.over("ucxx")]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path], transport: str) -> Iterator[Stack]:
    worker = f"--kv-transport {transport} --num-gpu-blocks-override 256 --log-level debug --log-format json"
    worker += " --prefix-fetch always --prefix-fetch-timeout-s 30"
    with new_stack(model_of("qwen2"), worker, prefill=["", ""], decode=["--local-prefill-max-tokens 0"] * 2) as stack:
        yield stack


async def test_a_prefix_is_fetched_from_a_peer_by_prefill_and_by_decode_workers(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    shared, tail = random_prompts([960], seed=31)[0], random_prompts([40] * 3, seed=32)
    prompts = [shared + each for each in tail]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    num_blocks = len(shared) // 32

    tokens, usage = await orders.generate(prompts[0], "decode-0", "prefill-0", [])
    assert (tokens, usage.num_cached_tokens, len(usage.fetched)) == (expected[0], 0, 0)

    source = orders.source("prefill-0", num_blocks)
    tokens, usage = await orders.generate(prompts[1], "decode-1", "prefill-1", [source])
    assert tokens == expected[1]
    (part,) = usage.fetched
    assert (part.holder_id, part.num_blocks, usage.num_cached_tokens) == ("prefill-0", num_blocks, len(shared))
    assert part.lane
    assert part.num_bytes > 0
    stack.wait_for(lambda: orders.were_lent_for_ours("prefill-0"), "the holder's lines to name the request")

    # From the decode worker's own cache, by another decode worker that prefills by itself.
    await orders.generate(prompts[0], "decode-0", "prefill-0", [])
    stack_reset = orders.source("decode-0", num_blocks)
    tokens, usage = await orders.generate(shared[:640] + tail[2], "decode-1", None, [stack_reset])
    assert tokens == reference_greedy(stack.model, [shared[:640] + tail[2]], NUM_NEW_TOKENS, ignore_eos=True)[0]
    assert usage.prefilled_locally
    assert usage.num_cached_tokens >= 640
    stack.check_clean()


async def test_another_holder_goes_on_where_the_first_one_ends(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    prompt = random_prompts([970], seed=35)[0]
    expected = reference_greedy(stack.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    await orders.generate(prompt[:330], "decode-0", "prefill-0", [])
    await orders.generate(prompt, "decode-0", "prefill-1", [])
    # The index may say more than is there: "prefill-0" has a third of it.
    sources = [orders.source("prefill-0", 30), orders.source("prefill-1", 30)]
    tokens, usage = await orders.generate(prompt, "decode-1", None, sources)
    assert [(part.holder_id, part.num_blocks) for part in usage.fetched] == [("prefill-0", 10), ("prefill-1", 20)]
    assert (tokens, usage.num_cached_tokens) == (expected, 960)
    stack.check_clean()


async def test_a_hint_that_is_wrong_costs_nothing_but_the_computing(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    prompt = random_prompts([500], seed=33)[0]
    expected = reference_greedy(stack.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    stale = orders.source("prefill-0", 15)
    gone = orders.source("prefill-0", 15)
    gone.kv_address, gone.holder_id = "127.0.0.1:9", "dead"
    reborn = orders.source("decode-0", 15)
    reborn.incarnation = "another-start"
    tokens, usage = await orders.generate(prompt, "decode-1", "prefill-1", [stale, gone, reborn])
    assert (tokens, usage.num_cached_tokens, len(usage.fetched)) == (expected, 0, 0)
    stack.check_clean()


async def test_equal_cold_prompts_at_once_compute_their_prefix_once(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    prompt = random_prompts([900], seed=34)[0]
    expected = reference_greedy(stack.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    results = await asyncio.gather(*(orders.generate(prompt, "decode-0", "prefill-0", []) for _ in range(12)))
    assert all(tokens == expected for tokens, _ in results)
    computed = sorted(len(prompt) - usage.num_cached_tokens for _, usage in results)
    # Who comes after the first has ended finds its full blocks (of 16 tokens) alone, and computes the rest.
    *others, first = computed
    assert first == len(prompt)
    assert set(others) <= {1, len(prompt) % 16}, computed
    stack.check_clean()
