"""vLLM's models divided among ranks, in real workers: whoever hands over to whom, and whatever happens to one rank.

Workers of one rank and of two serve the model together as "m". The wide prefill worker and the narrow decode worker
serve it by themselves as "wide to narrow", the other two as "narrow to wide", so that the router has no choice.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.block import BlockLayout
from tests.block_peer import BlockPeer
from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.orders import Orders
from tests.process_memory import flip_byte
from tests.stack import Stack

NUM_NEW_TOKENS = 8
NUM_RANKS = 2
NUM_SHARED_BLOCKS = 12
BLOCK_TOKENS = 32
WRONG = 7  # the block whose bit flips
LENGTHS = (1, 2, 31, 32, 33, 64, 65, 200, 256, 333, 700)
NARROW, WIDE = "", f"--tensor-parallel-size {NUM_RANKS}"

# Each rank imports vLLM for itself: a minute of two cores, until all are there.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def engine() -> str:
    return "vllm"


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], models: Callable[[str, str], Path], engine: str) -> Iterator[Stack]:
    def flags(ranks: str, name: str) -> list[str]:
        return [*ranks.split(), "--served-model-name", "m", name]

    prefill = [flags(NARROW, "narrow to wide"), flags(WIDE, "wide to narrow")]
    decode = [flags(WIDE, "narrow to wide"), flags(NARROW, "wide to narrow")]
    decode = [[*each, "--local-prefill-max-tokens", "0"] for each in decode]
    worker = "--num-gpu-blocks-override 128 --prefix-fetch always --prefix-fetch-timeout-s 30"
    with new_stack(models("llama3", engine), worker, prefill=prefill, decode=decode, patience_s=900) as stack:
        yield stack


class Case:
    """Two prompts that begin alike; the first is computed before, mostly by the wide prefill worker."""

    def __init__(self, stack: Stack, seed: int) -> None:
        self.stack = stack
        self.orders = Orders(stack, NUM_NEW_TOKENS)
        (self.shared,) = random_prompts([NUM_SHARED_BLOCKS * BLOCK_TOKENS], seed=seed)
        self.prompts = [self.shared + tail for tail in random_prompts([20, 20], seed=seed + 1000)]
        self.expected = reference_greedy(stack.model, self.prompts, NUM_NEW_TOKENS, ignore_eos=True)
        self.hashes = self.orders.hashes(self.shared)

    async def compute(self, decode: str, prefill: str = "prefill-1") -> None:
        tokens, usage = await self.orders.generate(self.prompts[0], decode, prefill, [])
        assert (tokens, usage.prefilled_locally) == (self.expected[0], False)

    def part(self, rank: int) -> slice:
        """Where in a block the second layer's keys and values of a rank's heads are."""
        layout = BlockLayout.from_wire(self.orders.record("prefill-1").layout)
        piece_bytes = layout.block_bytes // layout.num_layers // NUM_RANKS
        return slice((NUM_RANKS + rank) * piece_bytes, (NUM_RANKS + rank + 1) * piece_bytes)

    def flip(self, rank: int) -> None:
        """Flip a bit of a shared block where that rank of the wide prefill worker keeps it, and nowhere else."""
        record = self.orders.record("prefill-1")
        with BlockPeer(record) as peer:
            content = peer.fetch(record, self.hashes)[WRONG]
        pid = self.stack.services["prefill-1"].process.pid or 0
        flip_byte(pid, content[self.part(rank)], offset=100, num_copies=1, is_shared=True)

    def counts(self, decode: str) -> tuple[float, ...]:
        """Blocks that the prefill worker dropped, handoffs that failed by a digest, digests that were wrong."""
        return (
            self.stack.metric("prefill-1", "tandem:kv_blocks_corrupt_total"),
            self.stack.metric(decode, "tandem:handoff_failures_total", cause="digest"),
            self.stack.metric(decode, "tandem:digests_failed_total"),
        )


@pytest.mark.parametrize("name", ["narrow to wide", "wide to narrow"])
async def test_tokens_are_those_of_one_rank_where_prefill_and_decode_have_other_numbers(
    stack: Stack, name: str
) -> None:
    prompts = random_prompts(LENGTHS, seed=1)
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answers = await asyncio.gather(*(client.complete(prompt, model=name) for prompt in prompts))
    assert [answer.tokens for answer in answers] == expected
    workers = ("prefill-0", "decode-0") if name == "narrow to wide" else ("prefill-1", "decode-1")
    for answer, prompt in zip(answers, prompts, strict=True):
        receipt = answer.receipt
        assert (receipt["prefill_worker_id"], receipt["decode_worker_id"]) == workers
        assert receipt["handoff"]["blocks"] == -(-len(prompt) // BLOCK_TOKENS)
        assert receipt["handoff"]["first_token_equal"]
    stack.check_clean()


@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize("decode", ["decode-0", "decode-1"], ids=["to two ranks", "to one"])
async def test_a_byte_that_flips_on_one_rank_is_handed_over_to_none(stack: Stack, decode: str, rank: int) -> None:
    case = Case(stack, 11 + 2 * rank + (decode == "decode-0"))
    await case.compute("decode-1" if decode == "decode-0" else "decode-0")
    case.flip(rank)
    before = case.counts(decode)
    tokens, usage = await case.orders.generate(case.prompts[1], decode, "prefill-1", [], num_attempts=2)
    assert tokens == case.expected[1]
    assert case.counts(decode) == tuple(count + 1 for count in before)
    assert not usage.prefilled_locally, "the second attempt was handed a block that was computed again"
    assert usage.num_cached_tokens == WRONG * BLOCK_TOKENS
    stack.check_clean()


async def test_a_receipt_says_that_a_prompt_was_computed_again_for_a_flipped_byte(stack: Stack) -> None:
    case = Case(stack, 21)
    await case.compute("decode-0")
    case.flip(NUM_RANKS - 1)
    before = case.counts("decode-1")
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answer = await client.complete(case.prompts[1], model="wide to narrow")
    assert answer.tokens == case.expected[1]
    assert case.counts("decode-1") == tuple(count + 1 for count in before)
    receipt = answer.receipt
    assert (receipt["prefilled_locally"], receipt["handoff"]["blocks"]) == (True, 0), receipt
    stack.check_clean()


async def test_a_byte_of_one_ranks_that_changes_in_flight_is_used_by_none(stack: Stack) -> None:
    case = Case(stack, 31)
    await case.compute("decode-0", "prefill-0")
    failed = stack.metric("prefill-1", "tandem:digests_failed_total")
    with BlockPeer(case.orders.record("decode-0")) as peer:
        peer.fetch(case.orders.record("decode-0"), case.hashes)
        peer.flip(case.hashes[WRONG], offset=case.part(0).start + 100)
        source = peer.source(NUM_SHARED_BLOCKS)
        tokens, usage = await case.orders.generate(case.prompts[1], "decode-1", "prefill-1", [source])
        assert peer.suspected() == [case.hashes[WRONG]]
    assert (tokens, list(usage.fetched), usage.num_cached_tokens) == (case.expected[1], [], 0)
    assert stack.metric("prefill-1", "tandem:digests_failed_total") == failed + 1
    stack.check_clean()


@pytest.mark.parametrize("victim", ["prefill-1", "decode-0"])
async def test_a_rank_that_is_killed_under_load_costs_a_retry_and_no_answer(stack: Stack, victim: str) -> None:
    prompts, length = random_prompts([300] * 10, seed=41), 60
    expected = reference_greedy(stack.model, prompts, length, ignore_eos=True)
    service = stack.services[victim]
    ranks = ranks_of(service.process.pid or 0)
    assert len(ranks) == NUM_RANKS

    def is_at_work() -> bool:
        return stack.metric(victim, "vllm:num_requests_running") > 0

    async with Client(stack, length) as client:
        requests = [asyncio.create_task(client.complete(prompt)) for prompt in prompts]
        await asyncio.to_thread(stack.wait_for, is_at_work, f"{victim} to be at work")
        os.kill(ranks[-1], signal.SIGKILL)
        assert [answer.tokens for answer in await asyncio.gather(*requests)] == expected
        await asyncio.to_thread(service.process.join, 120)
        assert service.process.exitcode == 1, service.log
        assert "the engine crashed" in service.log
        assert not any(map(is_alive, ranks))
        stack.restart(victim)
        prefill, decode = (victim, "decode-1") if victim == "prefill-1" else ("prefill-0", victim)
        tokens, usage = await Orders(stack, length).generate(prompts[0], decode, prefill, [])
        assert (tokens, usage.prefilled_locally) == (expected[0], False)
    stack.check_clean()


def ranks_of(pid: int) -> list[int]:
    """The processes of a worker's ranks, in their order."""
    children = [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]
    named = [(Path(f"/proc/{child}/cmdline").read_text(), child) for child in children]
    return [child for name, child in sorted(named) if "Worker_TP" in name]


def is_alive(pid: int) -> bool:
    """Not what has ended and is still to be heard of by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
