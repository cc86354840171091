"""Many streams at once, some cut by their clients: the rest is right, and nothing leaks on either side."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.hf_models import random_prompts, reference_greedy, write_model
from tests.stack import Stack

NUM_STREAMS = 64
NUM_NEW_TOKENS = 40


@pytest.fixture(scope="module", params=["ucxx", "nixl"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Stack]]:
    directory = tmp_path_factory.mktemp(f"streams-{request.param}")
    model = write_model(directory / "model", "llama3")
    # A pool that cannot hold all the requests at once: they wait, and some are preempted.
    worker = ["--model", str(model), "--served-model-name", "m", "--kv-transport", request.param]
    prefill = ["--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "100"]
    decode = ["--local-prefill-max-tokens", "16", "--num-gpu-blocks-override", "100"]
    with Stack(directory / "logs", [prefill, prefill], [decode, decode], worker=worker) as stack:
        yield model, stack


async def stream(client: httpx.AsyncClient, prompt: list[int], cut_after: int | None) -> list[int] | None:
    """The stream's tokens; None if we cut it."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": NUM_NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    num_chunks = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        if cut_after == 0:
            return None
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                tokens += choice["token_ids"]
            num_chunks += 1
            if cut_after is not None and num_chunks >= cut_after:
                return None
    return tokens


async def run_streams(url: str, prompts: list[list[int]], seed: int) -> list[list[int] | None]:
    rng = random.Random(seed)
    cuts = [rng.choice([0, 1, 2, 5, 15]) if index % 3 == 0 else None for index in range(len(prompts))]
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(stream(client, *each) for each in zip(prompts, cuts, strict=True)))


async def test_cut_streams_harm_nobody_and_leak_nothing(served: tuple[Path, Stack]) -> None:
    model, stack = served
    rng = random.Random(5)
    prompts = random_prompts([rng.choice([3, 20, 40, 100, 250, 600]) for _ in range(NUM_STREAMS)], seed=3)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    results = await run_streams(stack.url, prompts, seed=7)
    uncut = [index for index, tokens in enumerate(results) if tokens is not None]
    assert len(uncut) >= NUM_STREAMS * 2 // 3
    assert [results[index] for index in uncut] == [expected[index] for index in uncut]
    stack.check_clean()
