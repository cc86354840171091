"""Many streams at once, some cut by their clients: the rest is right, and nothing leaks on either side."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.stack import Stack

NUM_STREAMS = 64
NUM_NEW_TOKENS = 40

pytestmark = [pytest.mark.on_vllm, pytest.mark.over("ucxx")]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path], transport: str) -> Iterator[Stack]:
    # A pool that cannot hold all the requests at once: they wait, and some are preempted.
    worker = f"--kv-transport {transport} --num-gpu-blocks-override 100"
    prefill, decode = ["--max-num-batched-tokens 128"] * 2, ["--local-prefill-max-tokens 16"] * 2
    with new_stack(model_of("llama3"), worker, prefill=prefill, decode=decode) as stack:
        yield stack


async def stream(client: Client, prompt: list[int], cut_after: int | None) -> list[int] | None:
    """The stream's tokens; None if we cut it."""
    tokens: list[int] = []
    num_chunks = 0
    async with client.stream(prompt) as chunks:
        if cut_after == 0:
            return None
        async for chunk in chunks:
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                tokens += choice["token_ids"]
            num_chunks += 1
            if cut_after is not None and num_chunks >= cut_after:
                return None
    return tokens


async def run_streams(stack: Stack, prompts: list[list[int]], seed: int) -> list[list[int] | None]:
    rng = random.Random(seed)
    cuts = [rng.choice([0, 1, 2, 5, 15]) if index % 3 == 0 else None for index in range(len(prompts))]
    async with Client(stack, NUM_NEW_TOKENS) as client:
        return await asyncio.gather(*(stream(client, *each) for each in zip(prompts, cuts, strict=True)))


async def test_cut_streams_harm_nobody_and_leak_nothing(stack: Stack) -> None:
    rng = random.Random(5)
    prompts = random_prompts([rng.choice([3, 20, 40, 100, 250, 600]) for _ in range(NUM_STREAMS)], seed=3)
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    results = await run_streams(stack, prompts, seed=7)
    uncut = [index for index, tokens in enumerate(results) if tokens is not None]
    assert len(uncut) >= NUM_STREAMS * 2 // 3
    assert [results[index] for index in uncut] == [expected[index] for index in uncut]
    stack.check_clean()
