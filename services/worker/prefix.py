"""A worker's part in prefix sharing: telling the index what its paged cache holds, lending it, fetching from others.

A fetch comes before the prompt is queued, so it overlaps with the computing of other prompts, and what it brings is
found by the scheduler as an ordinary prefix hit:

    choose the holder (fetch_costs.py) -> connect -> want (hashes) -> offer -> take blocks -> read, verify, confirm
    -> publish -> the prompt is queued while the blocks are still lent to us -> its first step -> give them back

Whatever goes wrong (a holder that died, evicted or lies; no room; too slow) costs the rest of the prefix being
computed here. Blocks taken for a fetch are freed when no late byte can arrive any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tandem.v1 import worker_pb2 as pb

from kvstore.block_hash import BlockHash
from kvstore.errors import IncompatiblePeer, KVStoreError, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange
from kvstore.fetch_events import FetchResult, Reservation
from kvstore.messages import AnnouncedBlock
from kvstore.prefix_index import IndexWriter, Tier
from kvstore.reader import Fetch
from services.engine.engine import Engine
from services.worker.engine_thread import EngineThread
from services.worker.fetch_costs import FetchCosts

log = logging.getLogger(__name__)

# Holders that one prompt is fetched from at most: each may have a longer prefix than the one before.
_MAX_SOURCES = 3


class NoRoom(KVStoreError):
    """The running requests need the blocks that a prefix would have come into."""


class CacheLender:
    """Lends the paged cache's blocks to readers that name them by hash. Digests are computed off loop and engine."""

    def __init__(self, engine: Engine, thread: EngineThread) -> None:
        self._engine = engine
        self._thread = thread

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        block_ids = await self._thread.call(self._engine.lend_prefix, hashes)
        if not block_ids:
            return []
        digests = await asyncio.to_thread(self._engine.memory.digests, block_ids)
        return [AnnouncedBlock(*block) for block in zip(block_ids, hashes, digests, strict=False)]

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        await self._thread.call(self._engine.release_blocks, [block.block_id for block in blocks])


class IndexFeed:
    """Tells the prefix index what the paged cache holds."""

    def __init__(self, redis_url: str, worker_id: str, incarnation: str, engine: Engine) -> None:
        self._writer = IndexWriter(
            redis_url, worker_id, incarnation, lambda: [(each, Tier.DEVICE) for each in engine.pool.cached_hashes()]
        )

    async def start(self) -> None:
        await self._writer.start()

    async def close(self) -> None:
        await self._writer.close()

    def changed(self, changes: Sequence[tuple[BlockHash, bool]]) -> None:
        """Blocks became findable (True) or were evicted (False), in this order."""
        for is_added, run in itertools.groupby(changes, key=lambda change: change[1]):
            hashes = [block_hash for block_hash, _ in run]
            if is_added:
                self._writer.added(hashes, Tier.DEVICE)
            else:
                self._writer.removed(hashes, Tier.DEVICE)

    def state(self) -> dict[str, object]:
        return {
            "redis": self._writer.connection_state.value,
            "synced": self._writer.synced,
            "num_pending": self._writer.num_pending,
        }


@dataclass
class FetchedPrefixes:
    """What was brought for one prompt. The blocks are lent to the holder of this object, who releases them."""

    block_ids: list[int] = field(default_factory=list)
    parts: list[pb.FetchedPrefix] = field(default_factory=list)


class PrefixFetcher:
    """Fetches prefixes for prompts that are about to be computed here. All methods belong to the event loop."""

    def __init__(
        self,
        worker_id: str,
        engine: Engine,
        thread: EngineThread,
        exchange: BlockExchange,
        costs: FetchCosts,
        timeout_s: float,
        count: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`count(tier, outcome)` is called once for every fetch that was tried."""
        self.costs = costs
        self._worker_id = worker_id
        self._engine = engine
        self._thread = thread
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._count = count
        self._clock = clock
        self._under_way: dict[BlockHash, asyncio.Future[None]] = {}  # by the first block that is being fetched
        self._disposals: set[asyncio.Task[None]] = set()

    async def fetch(
        self, hashes: Sequence[BlockHash], sources: Sequence[pb.PrefixSource], into: FetchedPrefixes
    ) -> None:
        """Bring the longest useful prefix of `hashes`. Fills `into` as it goes, and never raises for a failed fetch.

        `into` is right also when this is cancelled: its blocks are lent, and must be released.
        """
        tried: set[str] = set()
        while len(tried) < _MAX_SOURCES:
            # A hint, read from outside the engine thread; `take_prefix` looks again.
            num_present = self._engine.pool.peek_prefix(hashes)
            source = self._choose(hashes, num_present, [s for s in sources if s.holder_id not in tried])
            if source is None:
                return
            first = hashes[num_present]
            if first in self._under_way:
                await asyncio.wait([self._under_way[first]])
                continue
            tried.add(source.holder_id)
            done = self._under_way[first] = asyncio.get_running_loop().create_future()
            try:
                await self._fetch_from(source, hashes[: source.num_blocks], into)
            finally:
                del self._under_way[first]
                done.set_result(None)

    def _choose(
        self, hashes: Sequence[BlockHash], num_present: int, sources: Sequence[pb.PrefixSource]
    ) -> pb.PrefixSource | None:
        layout = self._engine.layout
        worthwhile = [
            source
            for source in sources
            if source.holder_id != self._worker_id
            and num_present < source.num_blocks <= len(hashes)
            and self.costs.fetching_pays(
                source.holder_id,
                num_tokens=(source.num_blocks - num_present) * layout.block_size,
                num_bytes=(source.num_blocks - num_present) * layout.block_bytes,
            )
        ]
        return max(worthwhile, key=lambda source: source.num_blocks, default=None)

    async def _fetch_from(self, source: pb.PrefixSource, hashes: Sequence[BlockHash], into: FetchedPrefixes) -> None:
        started_s = self._clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                owner = await self._exchange.connect(source.kv_address)
                result = await self._run(source, owner, hashes, into)
        except (PeerUnreachable, PeerLost, IncompatiblePeer, TimeoutError) as error:
            log.info("prefix of %d blocks from %s: %s", len(hashes), source.holder_id, error or "timed out")
            self._count(source.tier, "timeout" if isinstance(error, TimeoutError) else "unreachable")
            return
        if result.failure is not None:
            log.info("prefix of %d blocks from %s: %s", len(hashes), source.holder_id, result.failure)
            self._count(source.tier, result.failure.cause.value)
            return
        seconds = self._clock() - started_s
        self._count(source.tier, "ok")
        self.costs.fetched(source.holder_id, result.num_bytes, seconds)
        into.parts.append(
            pb.FetchedPrefix(
                holder_id=source.holder_id,
                tier=source.tier,
                lane=self._exchange.lane_to(owner),
                num_blocks=result.num_blocks,
                num_bytes=result.num_bytes,
                seconds=seconds,
            )
        )

    async def _run(
        self, source: pb.PrefixSource, owner: str, hashes: Sequence[BlockHash], into: FetchedPrefixes
    ) -> FetchResult:
        async def reserve(num_blocks: int) -> Reservation:
            reservation = await self._thread.call(self._engine.take_prefix, hashes[:num_blocks])
            if reservation is None:
                raise NoRoom(f"no room for a prefix of {num_blocks} blocks beside the running requests")
            return reservation

        fetch = self._exchange.fetch_prefix(os.urandom(16), owner, hashes, reserve, source.incarnation or None)
        taken = False
        try:
            result = await fetch.result
            if result.failure is None:
                # No await in between: from here on the blocks are `into`'s, and must not be lost to a cancellation.
                taken = True
                into.block_ids += result.block_ids
                await self._thread.call(self._engine.publish_blocks, result.block_ids, hashes[: len(result.block_ids)])
            return result
        finally:
            if not taken:
                self._dispose(fetch)

    def _dispose(self, fetch: Fetch) -> None:
        task = asyncio.create_task(self._free_after(fetch), name="dispose-prefix-fetch")
        self._disposals.add(task)
        task.add_done_callback(self._disposals.discard)

    async def _free_after(self, fetch: Fetch) -> None:
        fetch.abort("abandoned")
        block_ids = await fetch.quiesced
        result = await fetch.result
        if result.failure is None:
            block_ids = result.block_ids  # it succeeded in the very moment of its abandonment
        await self._thread.call(self._engine.release_blocks, block_ids)

    async def settle(self) -> None:
        """With the exchange closed: wait until all that fetches held has been given back."""
        if self._disposals:
            await asyncio.wait(self._disposals)
