"""How fast the prefix index answers, and what a block costs in Redis, against Redis's own PING in the same run.

    python -m tests.bench.bench_index [--blocks 1000000] [--holders 100] [--replicas 3] [--redis URL]

The index is filled through `IndexWriter`s, one per holder: 32 blocks of a system prompt that everybody has, and chains
of 1,024 blocks that each `--replicas` holders have. The prompts looked up are the system prompt and a chain, cut to
their length. All of it, Redis included, shares this machine. `--redis` names a server to use instead of a private one;
IT IS FLUSHED.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import redis.asyncio

from kvstore.block import BlockHash
from kvstore.index import IndexReader, IndexWriter, Tier
from kvstore.index.entries import Holding
from kvstore.registry import Registrar, open_client
from services.cli.embedded_redis import EmbeddedRedis
from tests.prefix_index.index_world import registrar
from tests.waiting import until

SHARED_BLOCKS = 32
CHAIN_BLOCKS = 1024
PROMPTS = (16, 128, 1024)
_LOOKUP_TIMEOUT_S = 10.0
_FILL_TIMEOUT_S = 600.0
_CONCURRENCY = 32


class Contents:
    """Which blocks there are and who has them."""

    def __init__(self, num_blocks: int, num_holders: int) -> None:
        self.num_holders = num_holders
        self.shared = self._hashes(b"shared", SHARED_BLOCKS)
        self.num_chains = max(1, (num_blocks - SHARED_BLOCKS) // CHAIN_BLOCKS)
        self.num_blocks = SHARED_BLOCKS + self.num_chains * CHAIN_BLOCKS

    def chain(self, number: int) -> list[BlockHash]:
        return self._hashes(number.to_bytes(8, "little"), CHAIN_BLOCKS)

    def prompt(self, number: int, num_blocks: int) -> list[BlockHash]:
        return (self.shared + self.chain(number))[:num_blocks]

    def held_by(self, holder: int, replica: int) -> Iterator[tuple[BlockHash, Tier]]:
        """What a holder adds for this replica of the chains; with the first, the system prompt, too."""
        if replica == 0:
            yield from ((block_hash, Tier.DEVICE) for block_hash in self.shared)
        for number in range(self.num_chains):
            # Neighbouring replicas of a chain lie far apart, so that no two are with one holder.
            if (number + replica * max(1, self.num_holders // 3)) % self.num_holders == holder:
                yield from ((block_hash, Tier.DEVICE) for block_hash in self.chain(number))

    @staticmethod
    def _hashes(chain: bytes, num_blocks: int) -> list[BlockHash]:
        data = hashlib.shake_128(chain).digest(16 * num_blocks)
        return [BlockHash(data[i : i + 16]) for i in range(0, len(data), 16)]


async def fill(
    url: str, contents: Contents, replica: int, writers: list[IndexWriter], registrars: list[Registrar]
) -> float:
    """Add one replica of every chain; return the seconds from the first report to the last write."""
    start_s = time.monotonic()
    if replica == 0:
        for holder in range(contents.num_holders):
            # The lease is long: filling keeps this one event loop busy.
            announced = registrar(url, f"worker-{holder}", "bench", lease_s=_FILL_TIMEOUT_S)
            await announced.start()
            registrars.append(announced)
            writer = IndexWriter(
                url, f"worker-{holder}", "bench", lambda holder=holder: contents.held_by(holder, 0), lease_s=60.0
            )
            await writer.start()
            writers.append(writer)
    else:
        for holder, writer in enumerate(writers):
            for block_hash, tier in contents.held_by(holder, replica):
                writer.added((block_hash,), tier)
            await asyncio.sleep(0)
    for writer in writers:
        await until(lambda writer=writer: writer.synced, _FILL_TIMEOUT_S)
    return time.monotonic() - start_s


async def measure(call: Callable[[], Awaitable[object]], seconds: float, concurrency: int) -> np.ndarray:
    """Return the duration (s) of each call made in so many seconds by so many callers."""
    durations: list[float] = []
    end_s = time.perf_counter() + seconds

    async def caller() -> None:
        while (start_s := time.perf_counter()) < end_s:
            await call()
            durations.append(time.perf_counter() - start_s)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return np.array(durations)


async def script_us(client: redis.asyncio.Redis) -> float:
    """Return the mean time of a script in Redis since the last reset, in microseconds."""
    stats = (await client.info("commandstats")).get("cmdstat_evalsha", {"usec_per_call": 0.0})
    return float(stats["usec_per_call"])


def row(name: str, durations: np.ndarray, per_second: float, in_redis_us: float | None, ping_p50_s: float) -> str:
    p50, p99 = np.percentile(durations, [50, 99])
    in_redis = f"{in_redis_us:11.0f}" if in_redis_us is not None else " " * 11
    return f"{name:<28}{p50 * 1e6:9.0f}{p99 * 1e6:9.0f}{p50 / ping_p50_s:10.1f}{in_redis}{per_second:12.0f}"


async def report_lookups(url: str, contents: Contents, num_replicas: int, seconds: float) -> None:
    reader = IndexReader(url, probe_s=60.0)
    await reader.start()
    await until(lambda: reader.available, _LOOKUP_TIMEOUT_S)
    rng = random.Random(1)
    async with open_client(url, _LOOKUP_TIMEOUT_S) as client:
        print(f"\n{'':28}{'p50 us':>9}{'p99 us':>9}{'x PING':>10}{'in Redis us':>11}{'/s at ' + str(_CONCURRENCY):>12}")
        ping = await measure(client.ping, seconds, 1)
        ping_at_once = await measure(client.ping, seconds, _CONCURRENCY)
        ping_p50_s = float(np.median(ping))
        print(row("PING", ping, len(ping_at_once) / seconds, None, ping_p50_s))
        for num_blocks in PROMPTS:
            prompts = [contents.prompt(rng.randrange(contents.num_chains), num_blocks) for _ in range(64)]

            async def look_up(prompts: list[list[BlockHash]] = prompts) -> list[Holding]:
                return await reader.lookup(rng.choice(prompts), _LOOKUP_TIMEOUT_S)

            found = await look_up()
            wanted = contents.num_holders if num_blocks <= SHARED_BLOCKS else num_replicas
            num_whole = sum(held.num_blocks == num_blocks for held in found)
            assert (len(found), num_whole) == (contents.num_holders, wanted), f"{len(found)} holders, {num_whole} whole"
            await client.config_resetstat()
            alone = await measure(look_up, seconds, 1)
            in_redis_us = await script_us(client)
            at_once = await measure(look_up, seconds, _CONCURRENCY)
            print(row(f"lookup of {num_blocks:,} blocks", alone, len(at_once) / seconds, in_redis_us, ping_p50_s))
        cold = [contents._hashes(f"cold {i}".encode(), 128) for i in range(64)]
        await client.config_resetstat()
        alone = await measure(lambda: reader.lookup(rng.choice(cold), _LOOKUP_TIMEOUT_S), seconds, 1)
        in_redis_us = await script_us(client)
        at_once = await measure(lambda: reader.lookup(rng.choice(cold), _LOOKUP_TIMEOUT_S), seconds, _CONCURRENCY)
        print(row("lookup of 128, nobody has", alone, len(at_once) / seconds, in_redis_us, ping_p50_s))
    await reader.close()


async def bench(url: str, arguments: argparse.Namespace) -> None:
    contents = Contents(arguments.blocks, arguments.holders)
    async with open_client(url, _LOOKUP_TIMEOUT_S) as client:
        await client.flushall()
        server = await client.info("server")
        empty_bytes = (await client.info("memory"))["used_memory"]
        print(f"Redis {server['redis_version']}, {contents.num_blocks:,} blocks, {contents.num_holders} holders")
        writers: list[IndexWriter] = []
        registrars: list[Registrar] = []
        print(f"\n{'replicas':>8}{'bytes per block':>17}{'blocks written /s':>19}{'script us per block':>21}")
        for replica in range(arguments.replicas):
            await client.config_resetstat()
            duration_s = await fill(url, contents, replica, writers, registrars)
            stats = (await client.info("commandstats"))["cmdstat_evalsha"]
            used_bytes = (await client.info("memory"))["used_memory"] - empty_bytes
            bytes_per_block = used_bytes / contents.num_blocks
            per_second, script_us_per_block = contents.num_blocks / duration_s, stats["usec"] / contents.num_blocks
            print(f"{replica + 1:>8}{bytes_per_block:>17.1f}{per_second:>19,.0f}{script_us_per_block:>21.1f}")
        bucket = b"{tandem}:ix:" + contents.chain(0)[0][:2]
        bucket_bytes, num_fields = await client.memory_usage(bucket), await client.hlen(bucket)
        encoding = (await client.object("ENCODING", bucket)).decode()
        print(f"a bucket: {encoding}, {num_fields} blocks, MEMORY USAGE {bucket_bytes} bytes")
        await report_lookups(url, contents, arguments.replicas, arguments.seconds)
        for member in (*writers, *registrars):
            await member.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="distinct blocks in the index")
    parser.add_argument("--holders", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=3, help="holders of each chain; memory is shown after each")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--redis", default="", help="URL of a server to FLUSH and use; empty: a private one")
    arguments = parser.parse_args()
    if arguments.holders < 1 or not 1 <= arguments.replicas <= min(3, arguments.holders):
        parser.error("at least one holder, and 1 to 3 replicas but no more than holders")
    with contextlib.ExitStack() as stack:
        url = arguments.redis or stack.enter_context(EmbeddedRedis.start()).url
        asyncio.run(bench(url, arguments))


if __name__ == "__main__":
    main()
