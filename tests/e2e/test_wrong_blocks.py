"""Blocks that are not what was computed, by a flipped bit or by a forger: nobody uses one, tokens are right.

A bit flips wherever a block can rest, and the holder drops and counts the block. A forger has the peers' secret, speaks
the protocol, and lends what he likes; he lacks the workers' proof key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.block import BlockLayout, HostMemory, ProofKey, subject_of
from kvstore.index import Tier
from services.engine.api import SamplingParams
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.scheduling import Request
from tests.block_peer import BlockPeer
from tests.hf_models import random_prompts, reference_greedy
from tests.index_view import until_held
from tests.orders import Orders
from tests.process_memory import flip_byte
from tests.stack import Stack

BLOCK_TOKENS = 32
NUM_SHARED_BLOCKS = 20
NUM_NEW_TOKENS = 8
NUM_BLOCKS = 64  # of a worker: two of the prompts, and not the one that evicts them beside them
WRONG = 12  # the block whose bit flips
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path], engine: str) -> Iterator[Stack]:
    worker = f"--num-gpu-blocks-override {NUM_BLOCKS} --max-model-len 1800"
    worker += " --prefix-fetch always --prefix-fetch-timeout-s 30"
    if engine == "native":
        worker += " --kv-offloading-size 0.05"
    store = "--store-dram-bytes 16MiB --store-disk-dir {disk} --store-disk-bytes 64MiB"
    decode = ["--local-prefill-max-tokens 0"] * 2
    with new_stack(model_of("qwen2"), worker, prefill=["", ""], decode=decode, store=[store]) as stack:
        yield stack


class Case:
    """Prompts that begin alike, and what a worker writes into the first one's blocks."""

    def __init__(self, stack: Stack, seed: int, num_new_tokens: int = NUM_NEW_TOKENS) -> None:
        self.stack = stack
        self.orders = Orders(stack, num_new_tokens)
        (self.shared,) = random_prompts([NUM_SHARED_BLOCKS * BLOCK_TOKENS], seed=seed)
        self.prompts = [self.shared + tail for tail in random_prompts([20] * 3, seed=seed + 1000)]
        self.expected = reference_greedy(stack.model, self.prompts, num_new_tokens, ignore_eos=True)
        self.hashes = self.orders.hashes(self.shared)
        self.contents: list[bytes] = []
        """Of the first prompt's full blocks at least, its answer's with them, once they are computed."""

    async def compute(self, decode: str, prefill: str | None) -> None:
        tokens, _ = await self.orders.generate(self.prompts[0], decode, prefill, [])
        assert tokens == self.expected[0]
        known = self.prompts[0] + tokens[:-1]
        if self.stack.engine == "native":
            self.contents = native_contents(self.stack.model, known)
        else:
            record = self.orders.record(decode)
            with BlockPeer(record) as peer:
                self.contents = peer.fetch(record, self.orders.hashes(known))

    @property
    def block_bytes(self) -> int:
        return BlockLayout.from_wire(self.orders.record("prefill-0").layout).block_bytes

    def flip(self, name: str, index: int = WRONG) -> None:
        # Known by its first tokens: a token that decode generates has other bits than one of a prompt.
        flip_byte(self.stack.services[name].process.pid or 0, self.contents[index][:640], offset=100)

    async def ask(self, number: int, decode: str, prefill: str, holder: str, tier: str = "device") -> int:
        """Have a prompt served by workers that have nothing of it: how many blocks came from the holder."""
        source = self.orders.source(holder, NUM_SHARED_BLOCKS, tier)
        tokens, usage = await self.orders.generate(self.prompts[number], decode, prefill, [source])
        assert tokens == self.expected[number]
        return sum(part.num_blocks for part in usage.fetched)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await asyncio.to_thread(self.stack.wait_for, condition, what)


def native_contents(model: Path, prompt: list[int]) -> list[bytes]:
    """What a worker of the stack writes into the blocks of this prompt: its engine is this one, to the last bit."""
    engine = Engine.from_config(EngineConfig(str(model), max_model_len=1800, num_gpu_blocks_override=64, num_threads=1))
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    request = Request("r", prompt, sampling, hold_blocks=True, transfer_id=bytes(16))
    engine.add_request(request)
    while engine.has_work:
        engine.step()
    memory = engine.memory
    assert isinstance(memory, HostMemory)
    return [memory.view(block_id).tobytes() for block_id in request.block_table]


@pytest.mark.on_vllm
async def test_a_prefill_workers_block_is_not_handed_over_and_not_again_on_a_retry(stack: Stack) -> None:
    case = Case(stack, 11)
    await case.compute("decode-0", "prefill-0")
    before = stack.metric("prefill-0", "tandem:kv_blocks_corrupt_total")
    case.flip("prefill-0")
    mismatches = stack.metric("decode-1", "tandem:handoff_failures_total", cause="digest")
    tokens, usage = await case.orders.generate(case.prompts[1], "decode-1", "prefill-0", [], num_attempts=2)
    assert tokens == case.expected[1]
    assert stack.metric("prefill-0", "tandem:kv_blocks_corrupt_total") == before + 1
    assert stack.metric("decode-1", "tandem:handoff_failures_total", cause="digest") == mismatches + 1
    assert not usage.prefilled_locally, "the second attempt was handed a block that was computed again"
    assert usage.num_cached_tokens == WRONG * BLOCK_TOKENS
    stack.check_clean()


@pytest.mark.on_vllm
async def test_a_prefill_workers_block_is_not_lent(stack: Stack) -> None:
    case = Case(stack, 12)
    await case.compute("decode-0", "prefill-0")
    before = stack.metric("prefill-0", "tandem:kv_blocks_corrupt_total")
    case.flip("prefill-0")
    mismatches = stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome="digest")
    assert await case.ask(1, "decode-1", "prefill-1", "prefill-0") == 0
    assert stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome="digest") == mismatches + 1
    await case.until(
        lambda: stack.metric("prefill-0", "tandem:kv_blocks_corrupt_total") == before + 1, "prefill-0 to drop it"
    )
    stack.check_clean()


@pytest.mark.on_vllm
@pytest.mark.parametrize("index", [WRONG, NUM_SHARED_BLOCKS], ids=["handed over", "generated"])
async def test_a_decode_workers_block_is_not_lent(stack: Stack, index: int) -> None:
    case = Case(stack, 20 + index, num_new_tokens=16)
    await case.compute("decode-0", "prefill-0")
    before = stack.metric("decode-0", "tandem:kv_blocks_corrupt_total")
    mismatches = stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome="digest")
    case.flip("decode-0", index)
    turn = case.prompts[0] + case.expected[0] + case.prompts[1][:40]
    source = case.orders.source("decode-0", NUM_SHARED_BLOCKS + 1)
    await case.until(lambda: shunned(stack, "prefill-1") == [], "decode-0 to be asked again")
    tokens, usage = await case.orders.generate(turn, "decode-1", "prefill-1", [source])
    assert tokens == reference_greedy(stack.model, [turn], 16, ignore_eos=True)[0]
    assert list(usage.fetched) == []
    assert stack.metric("prefill-1", "tandem:prefix_fetches_total", outcome="digest") == mismatches + 1
    await case.until(
        lambda: stack.metric("decode-0", "tandem:kv_blocks_corrupt_total") == before + 1, "decode-0 to drop it"
    )
    stack.check_clean()


def shunned(stack: Stack, name: str) -> object:
    return stack.debug_state(name)["shunned_holders"]


async def test_a_block_in_main_memory_does_not_come_back(stack: Stack) -> None:
    case = Case(stack, 13)
    await case.compute("decode-0", "prefill-0")
    (junk,) = random_prompts([1700], seed=14)
    await case.orders.generate(junk, "decode-0", "prefill-0", [])
    before = stack.metric("prefill-0", "tandem:host_tier_corrupt_total")
    case.flip("prefill-0")
    tokens, usage = await case.orders.generate(case.prompts[1], "decode-1", "prefill-0", [])
    assert (tokens, usage.num_cached_tokens) == (case.expected[1], WRONG * BLOCK_TOKENS)
    assert stack.metric("prefill-0", "tandem:host_tier_corrupt_total") == before + 1
    stack.check_clean()


async def test_a_block_that_flips_before_it_goes_to_main_memory_does_not_come_back(stack: Stack) -> None:
    case = Case(stack, 15)
    await case.compute("decode-0", "prefill-0")
    before = stack.metric("prefill-0", "tandem:host_tier_corrupt_total")
    case.flip("prefill-0")
    (junk,) = random_prompts([1700], seed=16)
    await case.orders.generate(junk, "decode-0", "prefill-0", [])
    tokens, usage = await case.orders.generate(case.prompts[1], "decode-1", "prefill-0", [])
    assert (tokens, usage.num_cached_tokens) == (case.expected[1], WRONG * BLOCK_TOKENS)
    assert stack.metric("prefill-0", "tandem:host_tier_corrupt_total") == before + 1
    stack.check_clean()


@pytest.mark.on_vllm
async def test_a_stores_block_in_memory_is_not_lent_and_its_copy_on_disk_is(stack: Stack) -> None:
    case = Case(stack, 17)
    await case.compute("decode-0", "prefill-0")
    await until_held(stack, case.hashes, "store-0", Tier.STORE)
    await case.until(lambda: len(places(case)) == NUM_SHARED_BLOCKS, "all to be on disk")
    before = stack.metric("store-0", "tandem:store_corrupt_blocks_total", tier="dram")
    case.flip("store-0")
    assert await case.ask(1, "decode-1", "prefill-1", "store-0", "store") == 0
    await case.until(
        lambda: stack.metric("store-0", "tandem:store_corrupt_blocks_total", tier="dram") == before + 1,
        "the store to drop it",
    )
    stack.restart(*WORKERS)
    assert await case.ask(2, "decode-1", "prefill-1", "store-0", "store") == NUM_SHARED_BLOCKS
    stack.check_clean()


@pytest.mark.on_vllm
async def test_a_block_on_disk_is_not_lent(stack: Stack) -> None:
    case = Case(stack, 18)
    await case.compute("decode-0", "prefill-0")
    await until_held(stack, case.hashes, "store-0", Tier.STORE)
    await case.until(lambda: len(places(case)) == NUM_SHARED_BLOCKS, "all to be on disk")

    def damage() -> None:
        path, at = places(case)[WRONG]
        with path.open("r+b") as file:
            file.seek(at + 77)
            file.write(bytes([case.contents[WRONG][77] ^ 16]))

    stack.restart(*WORKERS, "store-0", meanwhile=damage)
    assert await case.ask(1, "decode-0", "prefill-1", "store-0", "disk") == WRONG
    assert stack.metric("store-0", "tandem:store_corrupt_blocks_total", tier="disk") == 1
    # What was computed instead is offered to the store, which has all of it then.
    await until_held(stack, case.hashes, "store-0", Tier.DISK)
    assert await case.ask(2, "decode-1", "prefill-0", "store-0", "disk") == NUM_SHARED_BLOCKS
    stack.check_clean()


def places(case: Case) -> list[tuple[Path, int]]:
    """Where on disk the shared blocks are, as far as they are there."""
    content = {path: path.read_bytes() for path in case.stack.disk.glob("*.blocks")}
    payloads = case.contents[:NUM_SHARED_BLOCKS]
    found = ((path, content[path].find(payload)) for payload in payloads for path in content)
    return [(path, at) for path, at in found if at >= 0]


@pytest.mark.on_vllm
async def test_bytes_that_change_in_flight_are_not_used_and_the_holder_keeps_the_block(stack: Stack) -> None:
    # The holder is a process of the test. What it sends differs in one bit from what it announces, as after a flip on
    # the wire.
    case = Case(stack, 19)
    await case.compute("decode-0", "prefill-0")
    mismatches = stack.metric("prefill-1", "tandem:digests_failed_total")
    with BlockPeer(case.orders.record("prefill-0")) as peer:
        peer.fetch(case.orders.record("prefill-0"), case.hashes)
        peer.flip(case.hashes[-2], offset=1001)
        source = peer.source(NUM_SHARED_BLOCKS)
        tokens, usage = await case.orders.generate(case.prompts[1], "decode-1", "prefill-1", [source])
        assert peer.suspected() == [case.hashes[-2]]
    assert (tokens, list(usage.fetched), usage.num_cached_tokens) == (case.expected[1], [], 0)
    assert stack.metric("prefill-1", "tandem:digests_failed_total") == mismatches + 1
    stack.check_clean()


# ---- forged ----

FORGERIES = ("zeros", "zeros under the public key", "swapped blocks", "swapped proofs", "blocks under other names")
# By default what is proven with another key, and what is proven of another block. What else a proof refuses is in the
# tests of `ProofKey`.
DEFAULT_FORGERIES = ("zeros under the public key", "blocks under other names")


def forge(kind: str, peer: BlockPeer, case: Case) -> None:
    """Have the peer lend something else for block `WRONG` than was computed."""
    wrong, other = case.hashes[WRONG], case.hashes[3]
    block_bytes = case.block_bytes
    zeros = HostMemory.allocate(1, block_bytes)
    peer.fetch(case.orders.record("prefill-0"), case.hashes)
    match kind:
        case "zeros":
            peer.hold(case.hashes, bytes(block_bytes), [0] * NUM_SHARED_BLOCKS)
        case "zeros under the public key":
            proofs = [ProofKey.public().prove(zeros, [0], [subject_of(each)])[0] for each in case.hashes]
            peer.hold(case.hashes, bytes(block_bytes), proofs)
        case "swapped blocks":
            peer.swap(wrong, other, content=True, proofs=False)
        case "swapped proofs":
            peer.swap(wrong, other, content=False, proofs=True)
        case "blocks under other names":
            peer.swap(wrong, other, content=True, proofs=True)


@pytest.mark.on_vllm
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in DEFAULT_FORGERIES else pytest.mark.slow) for kind in FORGERIES]
)
async def test_what_a_forger_lends_is_not_used(stack: Stack, kind: str) -> None:
    case = Case(stack, 40 + FORGERIES.index(kind))
    await case.compute("decode-0", "prefill-0")
    failed = stack.metric("prefill-1", "tandem:digests_failed_total")
    with BlockPeer(case.orders.record("prefill-0")) as peer:
        forge(kind, peer, case)
        await case.until(lambda: shunned(stack, "prefill-1") == [], "the peer to be asked again")
        source = peer.source(NUM_SHARED_BLOCKS)
        tokens, usage = await case.orders.generate(case.prompts[1], "decode-1", "prefill-1", [source])
    assert (tokens, list(usage.fetched), usage.num_cached_tokens) == (case.expected[1], [], 0)
    assert stack.metric("prefill-1", "tandem:digests_failed_total") > failed
    stack.check_clean()


@pytest.mark.on_vllm
async def test_who_lacks_the_peers_secret_gives_a_store_nothing(stack: Stack) -> None:
    case = Case(stack, 51)
    store = case.orders.record("store-0")
    came = stack.metric("store-0", "tandem:peers_unproven_total", port="kv")
    with BlockPeer(case.orders.record("prefill-0"), has_secret=False) as stranger:
        stranger.hold(case.hashes, bytes(case.block_bytes), [0] * NUM_SHARED_BLOCKS)
        assert "secret" in stranger.offer(store, case.hashes)
    await case.until(
        lambda: stack.metric("store-0", "tandem:peers_unproven_total", port="kv") == came + 1, "the store to count him"
    )
    failed = stack.metric("prefill-0", "tandem:digests_failed_total")
    assert await case.ask(0, "decode-0", "prefill-0", "store-0", "store") == 0
    assert stack.metric("prefill-0", "tandem:digests_failed_total") == failed, "it has nothing of his"
    stack.check_clean()


@pytest.mark.on_vllm
async def test_what_a_forger_gives_a_store_is_not_used_and_leaves_it_for_what_was_computed(stack: Stack) -> None:
    case = Case(stack, 50)
    with BlockPeer(case.orders.record("prefill-0")) as peer:
        peer.hold(case.hashes, bytes(case.block_bytes), [0] * NUM_SHARED_BLOCKS)
        peer.offer(case.orders.record("store-0"), case.hashes)
        await until_held(stack, case.hashes, "store-0", Tier.STORE)
    refuted = stack.metric("store-0", "tandem:store_refuted_blocks_total")
    assert await case.ask(0, "decode-0", "prefill-0", "store-0", "store") == 0
    await case.until(
        lambda: stack.metric("store-0", "tandem:store_refuted_blocks_total") == refuted + NUM_SHARED_BLOCKS,
        "the store to drop them",
    )
    await until_held(stack, case.hashes, "store-0", Tier.STORE)
    stack.restart(*WORKERS)
    assert await case.ask(1, "decode-1", "prefill-1", "store-0", "store") == NUM_SHARED_BLOCKS, "as computed"
    stack.check_clean()
