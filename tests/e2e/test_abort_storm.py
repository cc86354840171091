"""Nine of ten clients leave in the same moment: the others get their tokens, and nothing of those who left remains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.stack import Stack

NUM_STREAMS = 500
NUM_NEW_TOKENS = 24
NUM_PROMPTS = 10


@pytest.mark.slow
@pytest.mark.on_vllm
async def test_an_abort_storm_costs_those_who_stay_no_token_and_no_block_is_lost(
    new_stack: Callable[..., Stack], model_of: Callable[[str], Path]
) -> None:
    model = model_of("qwen3")
    prompts = random_prompts([60] * NUM_PROMPTS, seed=31)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    stack = new_stack(
        model,
        "--num-gpu-blocks-override 512",
        prefill=["", ""],
        decode=["--local-prefill-max-tokens 0"] * 2,
        router=f"--max-concurrent-requests {NUM_STREAMS} --max-queue {2 * NUM_STREAMS}",
    )
    with stack:
        async with Client(stack, NUM_NEW_TOKENS, max_connections=NUM_STREAMS) as client:

            async def ask(number: int) -> list[int]:
                tokens: list[int] = []
                async with client.stream(prompts[number % NUM_PROMPTS]) as events:
                    async for event in events:
                        assert "error" not in event, event
                        tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
                return tokens

            streams = [asyncio.create_task(ask(number)) for number in range(NUM_STREAMS)]
            while not any(stack.debug_state(name)["live"] for name in ("decode-0", "decode-1")):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            for number, stream in enumerate(streams):
                if number % 10:
                    stream.cancel()
            await asyncio.wait(streams)
            for number in range(0, NUM_STREAMS, 10):
                assert streams[number].result() == expected[number % NUM_PROMPTS]
            assert (await client.complete(prompts[0])).tokens == expected[0]
        stack.check_clean()
