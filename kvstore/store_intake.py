"""How blocks come into a store node: workers say what they hold, and the node fetches what it lacks from them.

    have (a chain) -> queue -> what of it is not here? -> connect to the worker -> reserve slots -> fetch_prefix
    -> verify, confirm -> publish

Everything is a pull: nobody writes into another's memory, and a node that is busy simply fetches later or not at all.
An offer is a hint like any other. The chain is offered from its head each time it has grown, so an offer that was
dropped, or that came to nothing, is made good by the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.block_hash import BlockHash
from kvstore.errors import IncompatiblePeer, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange
from kvstore.fetch_events import Reservation
from kvstore.handshake import PeerIdentity
from kvstore.messages import Have
from kvstore.reader import Fetch
from kvstore.tiered_store import TieredStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IntakeLimits:
    """Bounds of what is done for the workers' offers."""

    max_queued: int = 1024
    """Offers that wait; the oldest gives way to a new one."""
    max_pulls: int = 4
    """Fetches at a time."""
    max_pull_bytes: int = 64 * 1024 * 1024
    """Of one fetch: what is reserved, and perhaps evicted, at once."""
    timeout_s: float = 30.0
    """Of one fetch, connecting included."""


@dataclass
class IntakeStats:
    """Counts since the start."""

    num_offers: int = 0
    num_offers_dropped: int = 0  # the queue was full
    num_offers_known: int = 0  # all of it was here, or on its way
    num_orphans: int = 0  # offers of the middle of a chain whose head is not here: no prefix would ever reach them
    num_pulled_blocks: int = 0
    num_pulled_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # offers that came to nothing or to less, by cause


@dataclass(frozen=True)
class _Offer:
    peer: PeerIdentity
    address: str
    parent_hash: BlockHash | None
    hashes: tuple[BlockHash, ...]


class Intake:
    """Takes offers and fetches what they name. All methods belong to the event loop.

    Close the exchange before `settle`: that ends the fetches, and with them everything that is done here.
    """

    def __init__(self, exchange: BlockExchange, store: TieredStore, limits: IntakeLimits | None = None) -> None:
        self.stats = IntakeStats()
        self._exchange = exchange
        self._store = store
        self._limits = limits or IntakeLimits()
        self._queue: dict[BlockHash, _Offer] = {}  # by the end of the chain; in order of arrival
        self._under_way: dict[BlockHash, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        # All pulls together may hold half of the memory, so that there is something to evict for them.
        memory = store.dram.memory
        self._max_pull_blocks = max(
            1,
            min(self._limits.max_pull_bytes // memory.block_bytes, memory.num_blocks // (2 * self._limits.max_pulls)),
        )

    @property
    def num_queued(self) -> int:
        """Offers that wait."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is fetched."""
        return not self._queue and not self._tasks

    def offered(self, peer: PeerIdentity, have: Have) -> None:
        """A worker holds these blocks. Returns at once."""
        self.stats.num_offers += 1
        if self._is_closing:
            return
        parent_hash = None if have.parent is None else BlockHash(have.parent)
        offer = _Offer(peer, have.address, parent_hash, tuple(BlockHash(each) for each in have.hashes))
        if self._num_known(offer.hashes) == len(offer.hashes):
            self.stats.num_offers_known += 1
            return
        self._queue.pop(offer.hashes[-1], None)  # the latest word on a chain is the one that counts
        while len(self._queue) >= self._limits.max_queued:
            del self._queue[next(iter(self._queue))]
            self.stats.num_offers_dropped += 1
        self._queue[offer.hashes[-1]] = offer
        self._start_some()

    def close(self) -> None:
        """Forget what waits, and start nothing more."""
        self._is_closing = True
        self._queue.clear()

    async def settle(self) -> None:
        """With the exchange closed: wait until every slot that fetches held has been given back."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ---- one offer ----

    def _start_some(self) -> None:
        while self._queue and len(self._tasks) < self._limits.max_pulls:
            offer = self._queue.pop(next(iter(self._queue)))
            task = asyncio.create_task(self._take_in(offer), name=f"intake from {offer.peer.peer_id}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stats.failures["internal"] += 1
            logger.error("taking in blocks broke", exc_info=error)
        self._start_some()

    def _num_known(self, hashes: Sequence[BlockHash]) -> int:
        """How many from the start are here or on their way."""
        known = itertools.takewhile(lambda each: each in self._under_way or self._is_here(each), hashes)
        return sum(1 for _ in known)

    def _is_here(self, block_hash: BlockHash) -> bool:
        return self._store.tier_of(block_hash) is not None

    async def _take_in(self, offer: _Offer) -> None:
        """Fetch what is missing of the chain, piece by piece, until it is all here or a piece fails."""
        hashes = offer.hashes
        if offer.parent_hash is not None and not self._is_here(offer.parent_hash):
            if offer.parent_hash not in self._under_way:
                self.stats.num_orphans += 1
                return
            await asyncio.wait([self._under_way[offer.parent_hash]])
        end = 0  # hashes[:end] were here, or on their way, or were fetched: each round gets further, or is the last
        while not self._is_closing:
            start = end + self._num_known(hashes[end:])
            if start == len(hashes):
                return
            piece = list(itertools.takewhile(lambda each: not self._is_here(each), hashes[start:]))
            piece = list(itertools.takewhile(lambda each: each not in self._under_way, piece))[: self._max_pull_blocks]
            # Pinned, the chain that we are about to continue is not what is evicted for its own tail.
            pins = self._store.dram.pin(hashes[:start], is_use=False)
            try:
                num_pulled = await self._pull_marked(offer, hashes[start - 1] if start else offer.parent_hash, piece)
            finally:
                self._store.dram.unpin(pin.slot for pin in pins)
            if num_pulled < len(piece):
                return
            end = start + num_pulled

    async def _pull_marked(self, offer: _Offer, parent_hash: BlockHash | None, hashes: Sequence[BlockHash]) -> int:
        """`_pull`, with what is being fetched known to the other offers."""
        done = asyncio.get_running_loop().create_future()
        self._under_way.update(dict.fromkeys(hashes, done))
        try:
            return await self._pull(offer, parent_hash, hashes)
        except (PeerUnreachable, PeerLost, IncompatiblePeer, TimeoutError) as error:
            cause = "timeout" if isinstance(error, TimeoutError) else "unreachable"
            self._failed(offer, len(hashes), cause, str(error) or "timed out")
            return 0
        finally:
            for block_hash in hashes:
                del self._under_way[block_hash]
            done.set_result(None)

    async def _pull(self, offer: _Offer, parent_hash: BlockHash | None, hashes: Sequence[BlockHash]) -> int:
        """Fetch and publish a run of blocks; how many. Raises what `connect` raises, and TimeoutError."""
        async with asyncio.timeout(self._limits.timeout_s):
            owner = await self._exchange.connect(offer.address)
            if owner != offer.peer.peer_id:
                self._failed(offer, len(hashes), "impostor", f"{offer.address} is {owner}")
                return 0
            slots = await self._store.reserve(len(hashes))
        if not slots:
            self._failed(offer, len(hashes), "no_room", "all of our memory is being read or filled")
            return 0
        return await self._fill(offer, owner, parent_hash, hashes[: len(slots)], slots)

    async def _fill(
        self,
        offer: _Offer,
        owner: str,
        parent_hash: BlockHash | None,
        hashes: Sequence[BlockHash],
        slots: list[int],
    ) -> int:
        """Fetch into these slots, which are ours. Each is published or abandoned once nobody writes to it any more."""
        unpublished = set(slots)

        async def reserve(num_blocks: int) -> Reservation:
            return Reservation(slots[:num_blocks])

        fetch: Fetch | None = None
        try:
            fetch = self._exchange.fetch_prefix(os.urandom(16), owner, hashes, reserve, offer.peer.incarnation)
            async with asyncio.timeout(self._limits.timeout_s):
                result = await fetch.result
            if result.failure is not None:
                self._failed(offer, len(hashes), result.failure.cause.value, result.failure.detail)
                return 0
            # Verified against the owner's digests; computed once more, since the result does not carry them.
            digests = await asyncio.to_thread(self._store.dram.memory.digests, result.block_ids)
            for slot, block_hash, digest in zip(result.block_ids, hashes, digests, strict=False):
                unpublished.discard(slot)
                self._store.publish(slot, block_hash, parent_hash, digest)
                parent_hash = block_hash
            self.stats.num_pulled_blocks += len(result.block_ids)
            self.stats.num_pulled_bytes += result.num_bytes
            return len(result.block_ids)
        finally:
            if fetch is not None:
                fetch.abort("given up")
                await fetch.quiesced
            self._store.abandon(unpublished)

    def _failed(self, offer: _Offer, num_blocks: int, cause: str, detail: str) -> None:
        self.stats.failures[cause] += 1
        logger.info("%d blocks offered by %s did not come: %s", num_blocks, offer.peer.peer_id, detail)
