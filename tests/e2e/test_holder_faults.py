"""Whoever lends a prefix dies, hangs, or sends other bytes than it said: the rest is computed, the tokens are right."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.index import Tier
from kvstore.protocol import FetchState
from tests.hf_models import random_prompts, reference_greedy
from tests.index_view import until_held
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 8
BLOCK_TOKENS = 32
NUM_SHARED_BLOCKS = 45

pytestmark = pytest.mark.on_vllm(slow=True)


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Stack]:
    # Two-sided reads: no byte moves while the holder stands still. That a peer is silent is noticed later than that a
    # fetch takes too long.
    everywhere = "--kv-transport ucxx --peer-timeout-s 20"
    worker = f"{everywhere} --num-gpu-blocks-override 256 --prefix-fetch always --prefix-fetch-timeout-s 10"
    store = everywhere + " --store-dram-bytes 64MiB --store-disk-dir {disk} --store-disk-bytes 64MiB"
    decode = ["--local-prefill-max-tokens 0"] * 2
    with new_stack(model_of("llama3"), worker, prefill=["", ""], decode=decode, store=[store]) as stack:
        yield stack


@pytest.fixture
def orders(stack: Stack) -> Orders:
    return Orders(stack, NUM_NEW_TOKENS)


class Prompts:
    """A prefix, and prompts that begin with it."""

    def __init__(self, model: Path, seed: int, num_prompts: int) -> None:
        (self.shared,) = random_prompts([NUM_SHARED_BLOCKS * BLOCK_TOKENS], seed=seed)
        self.prompts = [self.shared + tail for tail in random_prompts([20] * num_prompts, seed=seed + 100)]
        self.expected = reference_greedy(model, self.prompts, NUM_NEW_TOKENS, ignore_eos=True)


def fetches(stack: Stack, name: str) -> list[FetchState]:
    """The states of the fetches that a worker has under way."""
    exchange = stack.debug_state(name)["exchange"]
    assert isinstance(exchange, dict)
    return [FetchState(fetch["state"]) for fetch in exchange["fetches"]]


def num_leases(stack: Stack, name: str, reader: str) -> int:
    """How many leases a holder has open for that reader."""
    exchange = stack.debug_state(name)["exchange"]
    assert isinstance(exchange, dict)
    return sum(lease["reader"].startswith(f"{reader}/") for lease in exchange["leases"])


def stop_in_mid_fetch(stack: Stack, holder: str, reader: str) -> None:
    """Stop the holder while blocks are being read from it. It is stopped already; both go on by turns until then."""
    owner, client = (stack.services[name].process.pid or 0 for name in (holder, reader))
    stack.wait_for(lambda: fetches(stack, reader) == [FetchState.ORDERED], "the fetch to be ordered")
    os.kill(client, signal.SIGSTOP)
    try:
        os.kill(owner, signal.SIGCONT)
        stack.wait_for(lambda: num_leases(stack, holder, reader) == 1, "the blocks to be offered")
        os.kill(owner, signal.SIGSTOP)
    finally:
        os.kill(client, signal.SIGCONT)
    stack.wait_for(lambda: fetches(stack, reader) == [FetchState.READING], "reads to be under way")


@pytest.mark.parametrize("holder", ["prefill-0", "store-0"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_holder_lost_in_mid_fetch_costs_what_it_did_not_bring(
    stack: Stack, orders: Orders, holder: str, number: signal.Signals
) -> None:
    case = Prompts(stack.model, 101 + 10 * int(number) + len(holder), 3)
    # For a while after the fault before this one, nothing is fetched from that holder.
    await asyncio.to_thread(
        stack.wait_for, lambda: stack.debug_state("prefill-1")["shunned_holders"] == [], "the holder to be asked again"
    )
    process = stack.services[holder].process
    assert (await orders.generate(case.prompts[0], "decode-0", "prefill-0", []))[0] == case.expected[0]
    if holder == "store-0":
        await until_held(stack, orders.hashes(case.shared), "store-0", Tier.STORE)
    # Connections are up; the reader has the first blocks.
    await orders.generate(case.shared[: 4 * BLOCK_TOKENS + 5], "decode-1", "prefill-1", [orders.source(holder, 4)])

    outcome = "peer_lost" if number is signal.SIGKILL else "timeout"
    num_failed = stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome=outcome)
    source = orders.source(holder, NUM_SHARED_BLOCKS)
    os.kill(process.pid or 0, signal.SIGSTOP)
    try:
        answer = asyncio.create_task(orders.generate(case.prompts[1], "decode-1", "prefill-1", [source]))
        await asyncio.to_thread(stop_in_mid_fetch, stack, holder, "prefill-1")
        if number is signal.SIGKILL:
            process.kill()
        tokens, usage = await answer
        assert tokens == case.expected[1]
        assert (list(usage.fetched), usage.num_cached_tokens) == ([], 4 * BLOCK_TOKENS)
        assert stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome=outcome) == num_failed + 1
    finally:
        if number is signal.SIGSTOP:
            os.kill(process.pid or 0, signal.SIGCONT)
    if number is signal.SIGKILL:
        stack.restart(holder)
    # And on: what was computed instead is there for others.
    source = orders.source("prefill-1", NUM_SHARED_BLOCKS)
    tokens, usage = await orders.generate(case.prompts[2], "decode-0", None, [source])
    assert (tokens, usage.num_cached_tokens) == (case.expected[2], NUM_SHARED_BLOCKS * BLOCK_TOKENS)
    stack.check_clean()
