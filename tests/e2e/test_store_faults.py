"""A store node's memory and disk change under it, its files are cut, its disk is full: the tokens are right."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvstore.index import Tier
from tests.block_peer import BlockPeer
from tests.held_threads import held, named
from tests.hf_models import random_prompts, reference_greedy
from tests.index_view import num_held, until_held
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 8
BLOCK_TOKENS = 32
NUM_SHARED_BLOCKS = 40
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")

pytestmark = pytest.mark.on_vllm(slow=True)


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Stack]:
    worker = "--num-gpu-blocks-override 256 --prefix-fetch always --prefix-fetch-timeout-s 30"
    # Memory for 170 blocks, files of 170 blocks.
    store = "--store-dram-bytes 4MiB --store-disk-dir {disk} --store-disk-bytes 64MiB"
    decode = ["--local-prefill-max-tokens 0"] * 2
    with new_stack(model_of("qwen2"), worker, prefill=["", ""], decode=decode, store=[store]) as stack:
        yield stack


@pytest.fixture(scope="module")
def peer(stack: Stack) -> Iterator[BlockPeer]:
    with BlockPeer(Orders(stack, NUM_NEW_TOKENS).record("prefill-0")) as peer:
        yield peer


class Kept:
    """A prefix that the store has in memory and on disk, prompts that begin with it, and its blocks' bytes."""

    def __init__(self, stack: Stack, peer: BlockPeer, seed: int) -> None:
        self.stack = stack
        self._peer = peer
        self.orders = Orders(stack, NUM_NEW_TOKENS)
        (self.shared,) = random_prompts([NUM_SHARED_BLOCKS * BLOCK_TOKENS], seed=seed)
        self.prompts = [self.shared + tail for tail in random_prompts([20] * 3, seed=seed + 100)]
        self.expected = reference_greedy(stack.model, self.prompts, NUM_NEW_TOKENS, ignore_eos=True)
        self.hashes = self.orders.hashes(self.shared)
        self.payloads: list[bytes] = []

    async def keep(self) -> None:
        """Have prefill-0 and decode-0 compute the first prompt."""
        num_before = num_on_disk(self.stack)
        assert (await self.orders.generate(self.prompts[0], "decode-0", "prefill-0", []))[0] == self.expected[0]
        await until_held(self.stack, self.hashes, "store-0", Tier.STORE)
        self.payloads = self._peer.fetch(self.orders.record("prefill-0"), self.hashes)
        num_wanted = num_before + NUM_SHARED_BLOCKS
        await asyncio.to_thread(
            self.stack.wait_for,
            lambda: num_on_disk(self.stack) >= num_wanted and are_on_disk(self.stack.disk, self.payloads),
            "all to be on disk",
        )

    async def ask(self, number: int, decode: str, prefill: str | None, tier: str) -> int:
        """Have a prompt served, by whoever has nothing of it, with the store as the holder: how many blocks came."""
        source = self.orders.source("store-0", NUM_SHARED_BLOCKS, tier)
        tokens, usage = await self.orders.generate(self.prompts[number], decode, prefill, [source])
        assert tokens == self.expected[number]
        num_fetched = sum(part.num_blocks for part in usage.fetched)
        assert usage.num_cached_tokens == num_fetched * BLOCK_TOKENS
        return num_fetched


def num_on_disk(stack: Stack) -> int:
    found = stack.debug_state("store-0")["disk"]
    assert isinstance(found, dict)
    return int(found["num_blocks"])


def takes_nothing_in(stack: Stack) -> bool:
    intake = stack.debug_state("store-0")["intake"]
    assert isinstance(intake, dict)
    return bool(intake["is_idle"])


def is_at_rest(stack: Stack) -> bool:
    """Whether nobody offers the store anything, and all that it has taken in is on disk."""
    feeds = [stack.debug_state(name)["store_feed"] for name in WORKERS]
    queued = [node["num_queued"] for feed in feeds if isinstance(feed, dict) for node in feed["nodes"].values()]
    disk = stack.debug_state("store-0")["disk"]
    assert isinstance(disk, dict)
    return not any(queued) and takes_nothing_in(stack) and disk["num_to_write"] == 0


def are_on_disk(disk: Path, payloads: list[bytes]) -> bool:
    content = b"".join(path.read_bytes() for path in disk.glob("*.blocks"))
    return all(payload in content for payload in payloads)


def find(disk: Path, payload: bytes) -> tuple[Path, int]:
    """Where on disk a block is."""
    (found,) = ((path, at) for path in disk.glob("*.blocks") if (at := path.read_bytes().find(payload)) >= 0)
    return found


async def test_of_a_truncated_file_the_blocks_that_are_whole_are_used(stack: Stack, peer: BlockPeer) -> None:
    kept = Kept(stack, peer, seed=203)
    await kept.keep()
    places = [find(stack.disk, payload) for payload in kept.payloads]
    cut_path, cut_at = places[25]
    num_whole = next(i for i, (path, at) in enumerate(places) if path == cut_path and at >= cut_at)
    stack.restart(*WORKERS, "store-0", meanwhile=lambda: truncate(cut_path, cut_at + 1))
    assert await kept.ask(1, "decode-0", "prefill-1", "disk") == num_whole
    await until_held(stack, kept.hashes, "store-0", Tier.DISK)
    assert await kept.ask(2, "decode-1", None, "disk") == NUM_SHARED_BLOCKS
    stack.check_clean()


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


async def test_a_full_disk_stops_writing_and_nothing_else(stack: Stack, peer: BlockPeer) -> None:
    # A limit on the size of files stands for the full disk: the same calls fail, and it takes no privileges.
    pid = stack.services["store-0"].process.pid or 0
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    assert len(stack.services["store-0"].log) < 100_000, "the log goes on"
    # What the tests before have computed may be on its way still, by the workers' offers and then to the disk.
    await asyncio.to_thread(stack.wait_index_follows)
    await asyncio.to_thread(stack.wait_for, lambda: is_at_rest(stack), "the store to have written all")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, before[1]))
    num_before = num_on_disk(stack)
    try:
        # More than fits into memory, so that blocks are evicted that cannot be written. What finds no room is not kept.
        all_kept = [Kept(stack, peer, seed) for seed in range(204, 210)]
        for kept in all_kept:
            tokens, _ = await kept.orders.generate(kept.prompts[0], "decode-0", "prefill-0", [])
            assert tokens == kept.expected[0]
            await asyncio.to_thread(stack.wait_index_follows)
            await asyncio.to_thread(stack.wait_for, lambda: takes_nothing_in(stack), "the store to have taken in")
        await asyncio.to_thread(
            stack.wait_for, lambda: stack.metric("store-0", "tandem:store_disk_paused") == 1, "the disk to be paused"
        )
        assert num_on_disk(stack) <= num_before
        await asyncio.to_thread(stack.wait_index_follows)
        found = [await num_held(stack, each.hashes, "store-0") for each in all_kept]
        num_blocks, kept = max(found), all_kept[found.index(max(found))]
        assert num_blocks > 0, stack.debug_state("store-0")
        num_came = await kept.ask(1, "decode-1", "prefill-1", "store")
        # The last offers may have been on their way to the store still.
        num_blocks_after = await num_held(stack, kept.hashes, "store-0")
        assert min(num_blocks, num_blocks_after) <= num_came <= max(num_blocks, num_blocks_after)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    num_before = num_on_disk(stack)
    seeds = itertools.count(210)
    while num_on_disk(stack) <= num_before:  # ended by the test's own time limit
        (prompt,) = random_prompts([2 * BLOCK_TOKENS], seed=next(seeds))
        await kept.orders.generate(prompt, "decode-0", "prefill-0", [])
    # A block that was on its way when the disk was full may have paused it once more, after the first that went.
    await asyncio.to_thread(
        stack.wait_for, lambda: stack.metric("store-0", "tandem:store_disk_paused") == 0, "the disk to be written to"
    )
    stack.check_clean()


def why_not_ready(stack: Stack) -> str:
    answer = httpx.get(f"{stack.services['store-0'].debug_url}/ready", timeout=30)
    return str(answer.json().get("reason", ""))


@pytest.mark.slow
async def test_a_disk_that_hangs_is_found_and_what_is_in_memory_is_lent(stack: Stack, peer: BlockPeer) -> None:
    await Kept(stack, peer, 97).keep()
    threads = named(stack.services["store-0"].process.pid or 0, "disk-tier")
    assert threads, "nobody has written to the disk"
    hanging = Kept(stack, peer, 98)
    with contextlib.ExitStack() as cleanup:
        for thread in threads:
            cleanup.enter_context(held(thread))
        orders = hanging.orders
        assert (await orders.generate(hanging.prompts[0], "decode-0", "prefill-0", []))[0] == hanging.expected[0]
        stack.wait_for(lambda: why_not_ready(stack) == "no progress of: disk", "the watchdog to see it")
        assert stack.metric("store-0", "tandem:stuck_seconds", part="disk") > 10
        source = orders.source("store-0", NUM_SHARED_BLOCKS, "store")
        tokens, usage = await orders.generate(hanging.prompts[1], "decode-1", "prefill-1", [source])
        assert tokens == hanging.expected[1]
        assert [part.holder_id for part in usage.fetched] == ["store-0"]
    stack.wait_for(lambda: not why_not_ready(stack), "the disk to get on")
