"""Fetches prefixes of prompts from whoever holds them: peers, and store nodes.

A fetch comes before the prompt is queued, so it overlaps with the computing of other prompts, and what it brings is
found by the scheduler as an ordinary prefix hit:

    choose the holder (fetch_costs.py) -> connect -> want (what is missing here) -> offer -> take blocks -> read, verify
    -> confirm -> publish and release: cached blocks, the most recently used ones -> the next piece, from this holder or
    from another -> the prompt is queued and finds them

A queued prompt holds nothing, fetched blocks included, so queued prompts cannot wait for each other; blocks evicted
before its turn are computed. So are those of a failed fetch (a holder that died, evicted or lies; no room; too slow);
what was taken for it is freed when no late byte can arrive any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash
from kvstore.errors import IncompatiblePeer, KVStoreError, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange, Fetch
from kvstore.protocol import FetchCause, FetchFailure, FetchResult, FetchState, Reservation
from services.engine.api import Engine
from services.logs import current_request_id
from services.worker.engine_thread import EngineThread
from services.worker.prefixes.fetch_costs import FetchCosts
from services.worker.prefixes.host_prefixes import HostPrefixes
from services.worker.prefixes.shunned import Shunned
from services.worker.settling import Settlements

log = logging.getLogger(__name__)

# Holders that one prompt is fetched from at most: each may go on where the one before ended, or was lost.
_MAX_SOURCES = 3
# A holder is left alone for a while after one of these.
_HOLDERS_FAULTS = frozenset(
    {
        FetchCause.TIMEOUT,
        FetchCause.PEER_LOST,
        FetchCause.DIGEST_MISMATCH,
        FetchCause.HASH_MISMATCH,
        FetchCause.PROTOCOL,
        FetchCause.READ_FAILED,
    }
)


class NoRoom(KVStoreError):
    """The running requests need the blocks that a prefix would have come into."""


class PrefixFetcher:
    """Fetches prefixes for prompts that are about to be computed here. All methods belong to the event loop."""

    def __init__(
        self,
        worker_id: str,
        engine: Engine,
        thread: EngineThread,
        exchange: BlockExchange,
        host: HostPrefixes,
        costs: FetchCosts,
        timeout_s: float,
        count: Callable[[str, str, int, int], None],
    ) -> None:
        """`timeout_s` is how long nothing may come of a fetch until it is given up.

        `count(tier, outcome, num_blocks, num_bytes)` is called once for every fetch that was tried.
        """
        self.costs = costs
        self._worker_id = worker_id
        self._engine = engine
        self._thread = thread
        self._exchange = exchange
        self._host = host
        self._timeout_s = timeout_s
        self._count = count
        self._under_way: dict[BlockHash, asyncio.Future[None]] = {}  # by the first block that is being fetched
        self._disposals = Settlements("prefix fetches")
        self._shunned = Shunned(exchange.clock)  # holders that did not answer, or lied

    async def fetch(self, hashes: Sequence[BlockHash], sources: Sequence[pb.PrefixSource]) -> list[pb.FetchedPrefix]:
        """Bring the longest useful prefix of `hashes` into the cache: our own tiers' part, then what others have of the
        rest. Returns what was brought from others.

        Never raises for a failed fetch, gives up a holder of which nothing has come for the timeout, and fetching where
        all that failed has taken as long: the client waits.
        """
        await self._host.restore(hashes)
        # Piece by piece from the holder of the longest prefix; what it does not give, from another from there on.
        parts: list[pb.FetchedPrefix] = []
        exhausted: set[str] = set()
        fruitless_s = 0.0
        while len(exhausted) < _MAX_SOURCES and fruitless_s < self._timeout_s:
            # A hint, read from outside the engine thread; `take_prefix` looks again.
            num_present = self._engine.peek_prefix(hashes)
            source = self._choose(hashes, num_present, [s for s in sources if s.holder_id not in exhausted])
            if source is None:
                break
            first = hashes[num_present]
            if first in self._under_way:
                await asyncio.wait([self._under_way[first]])
                continue
            num_tokens = self.costs.piece_tokens(source.holder_id, source.tier)
            piece = max(1, num_tokens // self._engine.layout.block_size)
            end = min(source.num_blocks, num_present + piece)
            done = self._under_way[first] = asyncio.get_running_loop().create_future()
            started_s = self._exchange.clock()
            try:
                part = await self._fetch_from(source, hashes[:end], num_present)
            finally:
                del self._under_way[first]
                done.set_result(None)
            if part is None:
                fruitless_s += self._exchange.clock() - started_s
            else:
                _add_part(parts, part)
            if self._engine.peek_prefix(hashes) < end:
                exhausted.add(source.holder_id)
        return parts

    def _choose(
        self, hashes: Sequence[BlockHash], num_present: int, sources: Sequence[pb.PrefixSource]
    ) -> pb.PrefixSource | None:
        layout, shunned = self._engine.layout, self.shunned
        worthwhile = [
            source
            for source in sources
            if source.holder_id != self._worker_id
            and source.holder_id not in shunned
            and num_present < source.num_blocks <= len(hashes)
            and self.costs.fetching_pays(
                source.holder_id,
                source.tier,
                num_tokens=(source.num_blocks - num_present) * layout.block_size,
                start=num_present * layout.block_size,
            )
        ]
        return max(worthwhile, key=lambda source: source.num_blocks, default=None)

    async def _fetch_from(
        self, source: pb.PrefixSource, hashes: Sequence[BlockHash], start: int
    ) -> pb.FetchedPrefix | None:
        """Bring `hashes[start:]`, or as much of it as the holder has, to the blocks before, which are here."""
        started_s = self._exchange.clock()
        outcome, num_blocks, num_bytes = "unknown", 0, 0
        try:
            async with asyncio.timeout(self._timeout_s):
                owner = await self._exchange.connect(source.kv_address)
            result = await self._run(source, owner, hashes, start)
            if result.failure is None:
                outcome, num_blocks, num_bytes = "ok", result.num_blocks, result.num_bytes
            else:
                outcome = result.failure.cause.value
                log.info("blocks %d .. %d from %s: %s", start, len(hashes), source.holder_id, result.failure)
                if _is_holders_fault(result.failure):
                    self._shunned.add(source.holder_id)
        except (PeerUnreachable, PeerLost, IncompatiblePeer, TimeoutError) as error:
            outcome = "unreachable"
            log.info("prefix of %d blocks from %s: %r", len(hashes), source.holder_id, error)
            self._shunned.add(source.holder_id)
        except asyncio.CancelledError:
            outcome = "aborted"  # nobody waits for the prompt any more, which says nothing about the holder
            raise
        finally:
            self._count(source.tier, outcome, num_blocks, num_bytes)
        if outcome != "ok":
            return None
        seconds = self._exchange.clock() - started_s
        num_tokens = result.num_blocks * self._engine.layout.block_size
        self.costs.learner.fetched(source.holder_id, source.tier, num_tokens, seconds)
        return pb.FetchedPrefix(
            holder_id=source.holder_id,
            tier=source.tier,
            lane=self._exchange.lane_to(owner),
            num_blocks=result.num_blocks,
            num_bytes=result.num_bytes,
            seconds=seconds,
        )

    async def _run(self, source: pb.PrefixSource, owner: str, hashes: Sequence[BlockHash], start: int) -> FetchResult:
        head: list[int] = []  # the blocks before `start`: kept, so that what we fetch still continues something

        async def reserve(num_blocks: int) -> Reservation:
            end = start + num_blocks
            reservation = await self._thread.call(self._engine.take_prefix, hashes[:end])
            if reservation is None:
                raise NoRoom(f"no room for a prefix of {end} blocks beside the running requests")
            head.extend(reservation.block_ids[:start])
            tail = reservation.block_ids[start:]
            if reservation.num_present < start:
                await self._thread.call(self._engine.release_blocks, tail)
                raise NoRoom(f"of {start} blocks that were here, {reservation.num_present} are left")
            return Reservation(tail, reservation.num_present - start)

        fetch = self._exchange.fetch_prefix(
            self._exchange.new_id(),
            owner,
            hashes[start:],
            reserve,
            source.incarnation or None,
            current_request_id(),
            stage_s=self._timeout_s,
        )
        taken = False
        try:
            result = await fetch.result
            if result.failure is not None:
                return result
            # No await before the call, which runs even if we are cancelled: the blocks are ours to give back.
            taken = True
            await self._thread.call(self._cache, head, hashes[start - 1] if start else None, result, hashes[start:])
            return result
        finally:
            if not taken:
                self._disposals.start(self._free_after(fetch, head), name="dispose-prefix-fetch")

    def _cache(
        self, head: list[int], parent_hash: BlockHash | None, result: FetchResult, hashes: Sequence[BlockHash]
    ) -> None:  # engine thread
        fetched = hashes[: len(result.block_ids)]
        self._engine.publish_blocks(result.block_ids, fetched, result.proofs, parent_hash)
        self._engine.release_blocks(head + result.block_ids)

    async def _free_after(self, fetch: Fetch, head: list[int]) -> None:
        fetch.abort("abandoned")
        leftovers = await fetch.leftovers()
        await self._thread.call(self._engine.release_blocks, head + leftovers)

    @property
    def shunned(self) -> list[str]:
        """The holders that nothing is fetched from at present: prompts with the same prefix should not all try one that
        does not answer."""
        return self._shunned.names()

    async def settle(self) -> None:
        """Wait, with the exchange closed, until all that fetches held has been given back."""
        await self._disposals.settled()


def _is_holders_fault(failure: FetchFailure) -> bool:
    """Whether others should leave the holder alone for a while; that our own pool took too long is not its doing."""
    return failure.cause in _HOLDERS_FAULTS and failure.stage != FetchState.RESERVING.value


def _add_part(parts: list[pb.FetchedPrefix], part: pb.FetchedPrefix) -> None:
    """Pieces from one holder over one lane are one part."""
    for known in parts:
        if (known.holder_id, known.tier, known.lane) == (part.holder_id, part.tier, part.lane):
            known.num_blocks += part.num_blocks
            known.num_bytes += part.num_bytes
            known.seconds += part.seconds
            return
    parts.append(part)
