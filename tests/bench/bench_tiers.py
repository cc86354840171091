"""Throughput of the tiers and hit rates of their eviction, as tables.

    python -m tests.bench.bench_tiers [--directory DIR] [--total-mib 512] [--trace mooncake_conversation.jsonl]

DIR is a directory on the disk to be measured; a temporary one in it is used and removed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from kvstore.block import BlockHash, BlockLayout, HostMemory, Proof, checksum, checksums
from kvstore.pool import PROTECTED_SHARE
from kvstore.pool.slot_book import SlotBook
from kvstore.store import DiskTier, DiskWrites, TieredStore
from kvstore.store.disk_results import PutOutcome, StoredBlock
from tests.tiers.blocks import chain, parents
from tests.tiers.conversation_trace import (
    hit_rate_of_plain_lru,
    hit_rate_of_segmented_lru,
    hit_rate_without_bound,
    multi_turn_prompts,
)

LAYOUTS = {
    "384 KiB": BlockLayout(24, 2, 32, 64, "bfloat16", "bench"),
    "32 KiB": BlockLayout(2, 2, 32, 64, "bfloat16", "bench"),
}
PROMPT_BLOCKS = 64


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def print_row(name: str, num_blocks: int, block_bytes: int, duration_s: float) -> None:
    per_block_us = duration_s / num_blocks * 1e6
    print(f"  {name:44} {num_blocks * block_bytes / duration_s / 1e6:8.0f} MB/s {per_block_us:9.1f} us per block")


def drop_page_cache(directory: Path) -> None:
    for path in directory.glob("tandem.*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def bench_disk(layout: BlockLayout, directory: Path, total_bytes: int) -> None:
    block_bytes = layout.block_bytes
    num_blocks = int(total_bytes * 0.95) // block_bytes
    num_old = num_blocks // PROMPT_BLOCKS * PROMPT_BLOCKS
    prompts = [chain(f"prompt{i}", PROMPT_BLOCKS) for i in range(num_blocks * 3 // 2 // PROMPT_BLOCKS)]
    parent_of = {h: parent for prompt in prompts for h, parent in zip(prompt, parents(prompt), strict=True)}
    hashes, newer = list(parent_of)[:num_old], list(parent_of)[num_old:]
    content = np.random.default_rng(0).integers(0, 256, (32, block_bytes), dtype=np.uint8)
    known_by = [checksum(each) for each in content]
    target = np.empty(block_bytes, np.uint8)

    def put_all(tier: DiskTier, blocks: list[BlockHash]) -> None:
        for index, block_hash in enumerate(blocks):
            number = index % 32
            result = tier.put(block_hash, parent_of[block_hash], Proof(0), known_by[number], content[number])
            assert result.outcome is PutOutcome.STORED

    def get_all(tier: DiskTier, blocks: list[BlockHash]) -> None:
        for block_hash in blocks:
            assert isinstance(tier.get(block_hash, target), StoredBlock)

    def print_tier(name: str, blocks: list[BlockHash], duration_s: float) -> None:
        print_row(name, len(blocks), block_bytes, duration_s)

    with closing(DiskTier.open(directory, layout, total_bytes)) as tier:
        print_tier("put, disk tier empty, sync included", hashes, seconds(lambda: (put_all(tier, hashes), tier.sync())))
        print_tier("put, disk tier full, sync included", newer, seconds(lambda: (put_all(tier, newer), tier.sync())))
        some = tier.hashes()[-num_blocks // 4 :]
        print_tier("get, in the page cache", some, seconds(lambda: get_all(tier, some)))
    drop_page_cache(directory)
    start = time.perf_counter()
    with closing(DiskTier.open(directory, layout, total_bytes)) as tier:
        opened_s = time.perf_counter() - start
        print(f"  {'open, not in the page cache':44} {opened_s * 1e3:8.0f} ms for {len(tier)} blocks")
        print_tier("get, not in the page cache", some, seconds(lambda: get_all(tier, some)))


def bench_book() -> None:
    book = SlotBook(256, PROTECTED_SHARE)
    prompts = [chain(f"prompt{i}", PROMPT_BLOCKS) for i in range(32)]

    def insert_all() -> None:
        for prompt in prompts:
            slots = book.take(PROMPT_BLOCKS)
            for slot, block_hash, parent in zip(slots, prompt, parents(prompt), strict=True):
                book.publish(slot, block_hash, parent, Proof(0))
            book.release(slots)

    def pin_all() -> None:
        for _ in range(32):
            book.release([pin.slot for pin in book.pin(prompts[-1])])

    for name, work in (("insert 64-block prompts, evicting", insert_all), ("pin and unpin 64-block prompts", pin_all)):
        print(f"  {name:44} {'':13} {seconds(work) / 32 / PROMPT_BLOCKS * 1e6:9.1f} us per block")


async def bench_promotion(layout: BlockLayout, directory: Path) -> None:
    num_blocks = max(32, (64 << 20) // layout.block_bytes)
    hashes = chain("prompt", num_blocks)
    memory = HostMemory.allocate(num_blocks, layout.block_bytes)
    memory.array[:] = np.random.default_rng(0).integers(0, 256, memory.array.shape, dtype=np.uint8)
    disk = DiskTier.open(directory, layout, 4 * num_blocks * layout.block_bytes)
    store = TieredStore(memory, disk, disk_writes=DiskWrites.ALL)
    slots = await store.reserve(num_blocks)
    for slot, block_hash, parent in zip(slots, hashes, parents(hashes), strict=True):
        store.publish(slot, block_hash, parent, Proof(0), *checksums(memory, [slot]))
    start = time.perf_counter()
    assert await store.flush(120)
    print_row("write behind, durable", num_blocks, layout.block_bytes, time.perf_counter() - start)
    store.abandon(await store.reserve(num_blocks))
    for name in ("pin, all blocks on disk, in the page cache", "pin, all blocks on disk, not in the page cache"):
        if "not in" in name:
            drop_page_cache(directory)
        start = time.perf_counter()
        pinned = await store.pin(hashes, timeout_s=120)
        print_row(name, len(pinned), layout.block_bytes, time.perf_counter() - start)
        assert len(pinned) == num_blocks
        store.unpin(pin.slot for pin in pinned)
        store.abandon(await store.reserve(num_blocks))
    await store.close()


def mooncake_prompts(trace: Path, num_requests: int) -> Iterator[list[BlockHash]]:
    with open(trace, encoding="utf-8") as lines:
        for _, line in zip(range(num_requests), lines, strict=False):
            yield [BlockHash(int(number).to_bytes(16, "little")) for number in json.loads(line)["hash_ids"]]


def bench_hit_rates(name: str, prompts: list[list[BlockHash]], capacities: tuple[int, ...]) -> None:
    print(f"\n{name}: hit rate without bound {hit_rate_without_bound(iter(prompts)):.3f}")
    print("  capacity   plain LRU   LRU, tails first   segmented LRU")
    for capacity in capacities:
        head = hit_rate_of_plain_lru(iter(prompts), capacity, tail_first=False)
        tail = hit_rate_of_plain_lru(iter(prompts), capacity, tail_first=True)
        print(f"  {capacity:8} {head:11.3f} {tail:18.3f} {hit_rate_of_segmented_lru(iter(prompts), capacity):15.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--total-mib", type=int, default=512)
    parser.add_argument("--trace", type=Path, default=None, help="a Mooncake trace, for the hit rates")
    arguments = parser.parse_args()
    for name, layout in LAYOUTS.items():
        print(f"\nblocks of {name}")
        bench_book()
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            bench_disk(layout, Path(directory) / "disk", arguments.total_mib << 20)
            asyncio.run(bench_promotion(layout, Path(directory) / "store"))
    synthetic = list(multi_turn_prompts(1, 1_500, one_off_share=0.4))
    bench_hit_rates("synthetic chat, 40% one-off prompts", synthetic, (300, 600, 1_200, 2_400, 4_800))
    if arguments.trace is not None:
        mooncake = list(mooncake_prompts(arguments.trace, 6_000))
        bench_hit_rates("Mooncake, 6,000 requests", mooncake, (1_000, 4_000, 10_000, 30_000))


if __name__ == "__main__":
    main()
