"""Redis is killed, frozen and flushed under load, and tells of blocks that are gone: hints are lost, no answer is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from kvstore.index.scripts import IndexKeys
from kvstore.registry import WorkerRecord
from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.index_view import num_held
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 8
BLOCK_TOKENS = 32
NUM_CACHE_BLOCKS = 128
NUM_SHARED_TOKENS = 320


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Stack]:
    """Requests alternate between the prefill workers, so that each needs what the other has."""
    worker = f"--num-gpu-blocks-override {NUM_CACHE_BLOCKS} --prefix-fetch always --prefix-fetch-timeout-s 30"
    # The first lookup that finds Redis away waits so long; those after it not at all.
    router = "--routing-policy round-robin --index-timeout 2"
    decode = ["--local-prefill-max-tokens 0"] * 2
    with new_stack(model_of("qwen2"), worker, prefill=["", ""], decode=decode, router=router) as stack:
        yield stack


@pytest.fixture(scope="module")
def load(stack: Stack) -> list[tuple[list[int], list[int]]]:
    """Prompts that share prefixes, with their answers."""
    heads, tails = random_prompts([160] * 2, seed=61), random_prompts([20] * 8, seed=62)
    prompts = [heads[i % 2] + tail for i, tail in enumerate(tails)]
    return list(zip(prompts, reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True), strict=True))


class Load:
    """Clients that ask all the time, and what came of it."""

    def __init__(self) -> None:
        self.num_right = 0
        self.stop = asyncio.Event()

    async def ask(self, client: Client, prompts: list[tuple[list[int], list[int]]]) -> None:
        while not self.stop.is_set():
            for prompt, expected in prompts:
                assert (await client.complete(prompt)).tokens == expected
                self.num_right += 1

    async def goes_on(self, stack: Stack) -> None:
        """Some more requests have come through from here on."""
        wanted = self.num_right + 12
        await asyncio.to_thread(stack.wait_for, lambda: self.num_right >= wanted, "requests to be served meanwhile")


@asynccontextmanager
async def under_load(stack: Stack, prompts: list[tuple[list[int], list[int]]]) -> AsyncIterator[Load]:
    """Every request in here and around gets the right tokens."""
    load = Load()
    async with Client(stack, NUM_NEW_TOKENS) as client, asyncio.TaskGroup() as tasks:
        for first in range(3):
            tasks.create_task(load.ask(client, prompts[first:] + prompts[:first]))
        try:
            await load.goes_on(stack)
            yield load
        finally:
            load.stop.set()
    stack.check_clean()


async def a_new_prefix_is_fetched(stack: Stack, seed: int) -> None:
    """The index works: what one prefill worker computes, the other one fetches, by way of the router.

    A lookup on a busy machine may miss its deadline: there are three prefixes to try.
    """
    receipts = []
    for attempt in range(3):
        receipts.append(await _receipt_of_a_new_prefix(stack, seed + 10_000 * attempt))
        if receipts[-1]["fetched_tokens"] == NUM_SHARED_TOKENS:
            return
    raise AssertionError(receipts)


async def _receipt_of_a_new_prefix(stack: Stack, seed: int) -> dict[str, object]:
    """What the second of two prompts that share a prefix was answered with; both have the right tokens."""
    (shared,), tails = random_prompts([NUM_SHARED_TOKENS], seed=seed), random_prompts([20] * 2, seed=seed + 1000)
    prompts = [shared + tail for tail in tails]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(stack, NUM_NEW_TOKENS) as client:
        first = await client.complete(prompts[0])
        await asyncio.to_thread(stack.wait_index_follows)
        second = await client.complete(prompts[1])
    assert [first.tokens, second.tokens] == expected
    return second.receipt


async def index_is_back(stack: Stack) -> None:
    await asyncio.to_thread(
        stack.wait_for, lambda: stack.metric("router", "tandem:router_index_up") == 1, "the router to have its index"
    )
    await asyncio.to_thread(stack.wait_index_follows)


@pytest.mark.on_vllm(slow=True)
async def test_redis_killed_and_restarted_the_index_heals_by_itself(
    stack: Stack, load: list[tuple[list[int], list[int]]]
) -> None:
    await a_new_prefix_is_fetched(stack, seed=71)
    async with under_load(stack, load) as running:
        stack.kill_redis()
        await running.goes_on(stack)
        assert stack.metric("router", "tandem:router_index_up") == 0, "a metric says that the index is away"
        assert stack.metric("router", "tandem:router_index_lookups_total", outcome="no_answer") > 0
        stack.start_redis()
        await running.goes_on(stack)
    await index_is_back(stack)
    await a_new_prefix_is_fetched(stack, seed=72)
    stack.check_clean()


@pytest.mark.on_vllm(slow=True)
async def test_redis_frozen_for_5_seconds_costs_hits_only(
    stack: Stack, load: list[tuple[list[int], list[int]]]
) -> None:
    unanswered = stack.metric("router", "tandem:router_index_lookups_total", outcome="no_answer")
    async with under_load(stack, load) as running:
        os.kill(stack.redis.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(5)
            await running.goes_on(stack)
            assert stack.metric("router", "tandem:router_index_up") == 0
        finally:
            os.kill(stack.redis.pid, signal.SIGCONT)
        await running.goes_on(stack)
    assert stack.metric("router", "tandem:router_index_lookups_total", outcome="no_answer") > unanswered
    await index_is_back(stack)
    await a_new_prefix_is_fetched(stack, seed=73)
    stack.check_clean()


@pytest.mark.on_vllm(slow=True)
async def test_redis_flushed_again_and_again_costs_hits_only(
    stack: Stack, load: list[tuple[list[int], list[int]]]
) -> None:
    async with under_load(stack, load) as running:
        with redis.Redis.from_url(stack.redis.url) as server:
            for _ in range(5):
                server.flushall()
                await running.goes_on(stack)
    await index_is_back(stack)
    await a_new_prefix_is_fetched(stack, seed=74)
    stack.check_clean()


async def evict(orders: Orders, prefill: str, seed: int) -> None:
    """Push one prompt through a prefill worker: the blocks used longest ago are used for others."""
    await orders.generate(random_prompts([8 * BLOCK_TOKENS], seed=seed)[0], "decode-0", prefill, [])


@pytest.mark.on_vllm(slow=True)
async def test_a_block_that_was_reused_between_lookup_and_fetch_is_computed(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    (shared,), tails = random_prompts([16 * BLOCK_TOKENS], seed=81), random_prompts([20] * 2, seed=82)
    prompts = [shared + tail for tail in tails]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    hashes = orders.hashes(shared)

    assert (await orders.generate(prompts[0], "decode-0", "prefill-0", []))[0] == expected[0]
    await asyncio.to_thread(stack.wait_index_follows)
    looked_up = await num_held(stack, hashes, "prefill-0")
    assert looked_up == 16
    for seed in range(1000, 1000 + NUM_CACHE_BLOCKS // 8):
        await evict(orders, "prefill-0", seed)
        await asyncio.to_thread(stack.wait_index_follows)
        num_left = await num_held(stack, hashes, "prefill-0")
        if num_left < looked_up:
            break
    assert 0 < num_left < looked_up, "some are left, the others' memory has other content now"

    tokens, usage = await orders.generate(prompts[1], "decode-1", "prefill-1", [orders.source("prefill-0", looked_up)])
    assert tokens == expected[1]
    (part,) = usage.fetched
    assert (part.num_blocks, usage.num_cached_tokens) == (num_left, num_left * BLOCK_TOKENS)
    stack.check_clean()


@pytest.mark.on_vllm(slow=True)
async def test_entries_of_blocks_that_are_gone_cost_a_question_and_nothing_else(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    (shared,), tails = random_prompts([16 * BLOCK_TOKENS], seed=83), random_prompts([20] * 2, seed=84)
    prompts = [shared + tail for tail in tails]
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    hashes = orders.hashes(shared)

    assert (await orders.generate(prompts[0], "decode-0", "prefill-0", []))[0] == expected[0]
    await asyncio.to_thread(stack.wait_index_follows)
    base = IndexKeys.under("tandem").base.encode()
    with redis.Redis.from_url(stack.redis.url) as server:
        kept = {key: server.dump(key) for key in {base + block_hash[:2] for block_hash in hashes}}
        for seed in range(2000, 2000 + NUM_CACHE_BLOCKS // 8):
            await evict(orders, "prefill-0", seed)
        await asyncio.to_thread(stack.wait_index_follows)
        assert [await num_held(stack, hashes, holder) for holder in ("prefill-0", "decode-0")] == [0, 0]
        for key, content in kept.items():
            server.restore(key, 0, content, replace=True)
    assert [await num_held(stack, hashes, holder) for holder in ("prefill-0", "decode-0")] == [16, 16], "a lie"

    refused = stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome="revoked")
    async with Client(stack, NUM_NEW_TOKENS) as client:
        for filler in random_prompts([40] * 2, seed=85):
            if (await client.complete(filler)).receipt["prefill_worker_id"] == "prefill-0":
                break  # round-robin: the other one is next
        answer = await client.complete(prompts[1])
    assert answer.tokens == expected[1]
    sequence = answer.receipt
    assert (sequence["prefill_worker_id"], sequence["computed_tokens"]) == ("prefill-1", len(prompts[1]))
    assert stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome="revoked") == refused + 2
    stack.check_clean()


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-0"])
async def test_of_two_workers_with_one_id_the_newer_serves_and_the_older_takes_over(
    stack: Stack, load: list[tuple[list[int], list[int]]], worker_id: str
) -> None:
    service = stack.services[worker_id]
    worked = f"vllm:{'prompt' if service.role == 'prefill' else 'generation'}_tokens_total"
    incarnation = Orders(stack, NUM_NEW_TOKENS).record(worker_id).incarnation

    def holder() -> WorkerRecord | None:
        return next((record for record in stack.records() if record.worker_id == worker_id), None)

    async with under_load(stack, load) as running:
        argv = service.argv[: service.argv.index("--worker-id")]
        twin = stack.start("twin", service.role, argv, worker_id)

        def is_the_twins() -> bool:
            record = holder()
            return record is not None and record.incarnation != incarnation

        await asyncio.to_thread(stack.wait_for, is_the_twins, "the twin to announce itself")
        record = holder()
        assert record is not None
        twin.debug_url = f"http://{record.http_address}"
        await asyncio.to_thread(stack.wait_for, lambda: "a newer process" in service.log, "the older one to say so")
        await running.goes_on(stack)
        await asyncio.to_thread(stack.wait_for, lambda: stack.metric("twin", worked) > 0, "the twin to have work")
        twin.process.kill()
        await running.goes_on(stack)

        def is_the_older_ones() -> bool:
            record = holder()
            return record is not None and record.incarnation == incarnation

        await asyncio.to_thread(stack.wait_for, is_the_older_ones, "the older one to take over")
        await running.goes_on(stack)
    del stack.services["twin"]
    await a_new_prefix_is_fetched(stack, seed=91 + len(worker_id))
    stack.check_clean()
