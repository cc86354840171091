"""What workers computed outlives them: a store node lends it from its memory, and after its own restart from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.index import Tier
from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.index_view import until_held
from tests.orders import Orders
from tests.reach import listening, reached_from_elsewhere
from tests.stack import Stack

NUM_NEW_TOKENS = 40
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")

pytestmark = [pytest.mark.on_vllm, pytest.mark.over("nixl")]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path], transport: str) -> Iterator[Stack]:
    worker = f"--kv-transport {transport} --num-gpu-blocks-override 256"
    worker += " --prefix-fetch always --prefix-fetch-timeout-s 30"
    store = f"--kv-transport {transport} --log-level debug --log-format json --store-dram-bytes 64MiB"
    store += " --store-disk-dir {disk} --store-disk-bytes 64MiB"
    decode = ["--local-prefill-max-tokens 0"] * 2
    router = "--index-timeout 5"
    with new_stack(model_of("qwen2"), worker, prefill=["", ""], decode=decode, store=[store], router=router) as stack:
        yield stack


def num_kept(stack: Stack, tier: str) -> int:
    found = stack.debug_state("store-0")[tier]
    assert isinstance(found, dict)
    return int(found["num_blocks"])


def test_no_process_is_reached_under_another_address_than_its_own(stack: Stack) -> None:
    for service in stack.services.values():
        assert service.process.pid is not None
        assert len(listening(service.process.pid)) > 0, service.name
        assert reached_from_elsewhere(service.process.pid) == [], service.name


async def test_a_prefix_is_a_hit_on_every_replica_whoever_of_them_has_it_and_wherever(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    (shared,), tails = random_prompts([1500], seed=51), random_prompts([30] * 12, seed=53)
    num_shared = len(shared) // 32
    prompts = [shared + tail for tail in tails]
    answers = dict(
        zip(map(tuple, prompts), reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True), strict=True)
    )

    async def is_fetched(decode: str, prefill: str | None, holder: str, tier: str) -> None:
        """Whoever prefills has nothing of the prefix and takes it from `holder`.

        Once of eleven times it may compute it, right as ever: where a link's ends wait for a processor for seconds.
        """
        prompt = prompts.pop()
        source = orders.source(holder, num_shared, tier)
        tokens, usage = await orders.generate(prompt, decode, prefill, [source])
        assert tokens == answers[tuple(prompt)]
        if not (usage.fetched or missed):
            missed.append(f"{prefill or decode} computed what {holder} has in {tier}")
            return
        assert usage.fetched, missed
        (part,) = usage.fetched
        assert (part.holder_id, part.tier, part.num_blocks) == (holder, tier, num_shared)
        assert usage.num_cached_tokens == num_shared * 32

    missed: list[str] = []
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


async def test_the_router_finds_in_the_index_what_only_the_store_has(stack: Stack) -> None:
    prompt = random_prompts([700], seed=52)[0]
    expected = reference_greedy(stack.model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answer = await client.complete(prompt)
    assert (answer.tokens, answer.num_cached) == (expected, 0)
    await until_held(stack, Orders(stack, NUM_NEW_TOKENS).hashes(prompt), "store-0", Tier.STORE)
    stack.restart(*WORKERS)
    stack.wait_ready()
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answer = await client.complete(prompt)
    assert (answer.tokens, answer.num_cached) == (expected, len(prompt) // 32 * 32)


async def test_a_long_answer_is_kept_while_it_grows_so_that_its_workers_loss_costs_a_fetch(stack: Stack) -> None:
    (prompt,), num_said, length = random_prompts([100], seed=54), 140, 1800
    expected = reference_greedy(stack.model, [prompt], num_said + NUM_NEW_TOKENS, ignore_eos=True)[0]
    said: list[int] = []
    async with Client(stack, NUM_NEW_TOKENS) as client:
        async with client.stream(prompt, max_tokens=length) as chunks:
            async for chunk in chunks:
                said += chunk["choices"][0]["token_ids"]
                if len(said) >= num_said:
                    break
            grown = Orders(stack, NUM_NEW_TOKENS).hashes([*prompt, *said[: num_said - 1]])
            await until_held(stack, grown, "store-0", Tier.STORE)
            assert sum(stack.metric(name, "vllm:num_requests_running") for name in WORKERS) == 1, "it still goes on"
        stack.restart(*WORKERS)
        stack.wait_ready()
        answer = await client.complete([*prompt, *said[:num_said]])
    assert said[:num_said] == expected[:num_said]
    assert answer.tokens == expected[num_said:]
    (part,) = answer.receipt["fetched"]
    assert (part["holder_id"], part["blocks"]) == ("store-0", len(grown))
    assert len(grown) > len(prompt) // 32 + 3
    assert answer.receipt["computed_tokens"] < 32 + 1


async def test_a_stream_whose_worker_is_killed_goes_on_from_the_blocks_that_the_store_has(stack: Stack) -> None:
    # It goes on for long, so that it does still when the store has what was said; compared is the first part.
    (prompt,), num_said, length = random_prompts([100], seed=56), 140, 1800
    expected = reference_greedy(stack.model, [prompt], 1000, ignore_eos=True)[0]
    said: list[int] = []
    victim, receipt = "", dict[str, Any]()
    async with Client(stack, length) as client, client.stream(prompt, receipt=True) as chunks:
        async for chunk in chunks:
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                said += choice["token_ids"] or []
            receipt = chunk.get("receipt", receipt)
            if not victim and len(said) >= num_said:
                grown = Orders(stack, length).hashes([*prompt, *said[: num_said - 1]])
                await until_held(stack, grown, "store-0", Tier.STORE)
                decode = ("decode-0", "decode-1")
                (victim,) = (name for name in decode if stack.metric(name, "vllm:num_requests_running"))
                stack.services[victim].process.kill()
    assert (len(said), said[: len(expected)]) == (length, expected)
    ((resume,),) = (sequence["resumes"] for sequence in receipt["sequences"])
    assert (resume["worker_id"], resume["reason"]) == (victim, "lost")
    num_known = len(prompt) + resume["carried_tokens"]
    assert resume["fetched_tokens"] >= 32 * len(grown) - len(prompt), "the rest its prefill worker has"
    assert resume["recomputed_tokens"] <= num_known - 32 * len(grown)
    stack.restart(victim)
