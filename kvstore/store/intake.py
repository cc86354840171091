"""Takes blocks into a store node: workers say what they hold, the node fetches what it lacks.

    have (a chain) -> the worker's line -> connect to the worker -> what of it is not here? -> reserve slots
    -> fetch_prefix -> confirm -> checksums -> publish, with the proofs that they came with

Nobody writes into another's memory: a busy node fetches later or not at all. An offer is a hint. A chain is offered
from its head each time it has grown, so the next offer makes good one that was dropped or failed. Each worker has a
line of its own: one that has vanished is dialled once for all its offers, and takes nobody else's turn. What a reader
doubts is offered again by whoever computed it instead, perhaps before it is dropped: such offers wait until it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.block import BlockHash, checksums
from kvstore.errors import IncompatiblePeer, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange, Fetch, PeerIdentity
from kvstore.protocol import Have, Reservation
from kvstore.store.tiered_store import TieredStore
from kvstore.threads import Threads

logger = logging.getLogger(__name__)


_MAX_QUEUED = 1024  # offers that wait; the oldest of whoever has most gives way to a new one
_MAX_PULLS = 4  # fetches at a time; of one worker half of them, so that one which hangs leaves room for others
_MAX_PULL_BYTES = 64 * 1024 * 1024  # of one fetch: what is reserved, and perhaps evicted, at once
_SETTLE_S = 15.0  # with the exchange closed: until fetches that do not end are left alone


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


@dataclass
class _Line:
    """The offers of one start of one worker, and the number of tasks that fetch them."""

    queue: dict[BlockHash, _Offer] = field(default_factory=dict)  # by the end of the chain; in order of arrival
    num_tasks: int = 0


@dataclass(frozen=True, eq=False)
class _Pull:
    """Blocks that are being fetched, or doubted, and the offers that go on when that has ended, well or badly."""

    waiting: dict[tuple[str, BlockHash], _Offer] = field(default_factory=dict)  # by worker and end of the chain


class Intake:
    """Takes offers and fetches what they name. All methods belong to the event loop.

    Close the exchange before `settle`: that ends the fetches, and with them everything that is done here.
    """

    def __init__(self, exchange: BlockExchange, store: TieredStore, threads: Threads) -> None:
        self.stats = IntakeStats()
        self._exchange = exchange
        self._store = store
        self._threads = threads
        self._lines: dict[str, _Line] = {}  # by peer id
        self._under_way: dict[BlockHash, _Pull] = {}
        self._num_waiting = 0  # for what is under way
        self._pulls = asyncio.Semaphore(_MAX_PULLS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        # All pulls together may hold half of the memory, so that there is something to evict for them.
        memory = store.memory
        self._max_pull_blocks = max(
            1,
            min(_MAX_PULL_BYTES // memory.block_bytes, memory.num_blocks // (2 * _MAX_PULLS)),
        )

    @property
    def num_queued(self) -> int:
        """Offers that wait."""
        return sum(len(line.queue) for line in self._lines.values()) + self._num_waiting

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is fetched."""
        return not self._lines and not self._tasks

    def offered(self, peer: PeerIdentity, have: Have) -> None:
        """A worker holds these blocks. Returns at once."""
        self.stats.num_offers += 1
        parent_hash = None if have.parent is None else BlockHash(have.parent)
        offer = _Offer(peer, have.address, parent_hash, tuple(BlockHash(each) for each in have.hashes))
        if self._num_here(offer.hashes) < len(offer.hashes):
            self._enqueue(offer)
        elif not any(self._waits(offer, each) for each in offer.hashes):
            self.stats.num_offers_known += 1

    @contextlib.contextmanager
    def holding_back(self, hashes: Iterable[BlockHash]) -> Iterator[None]:
        """Have offers of these blocks wait: they are being fetched, or a reader doubts those that are here."""
        pull = _Pull()
        ours = [each for each in dict.fromkeys(hashes) if each not in self._under_way]
        self._under_way.update(dict.fromkeys(ours, pull))
        try:
            yield
        finally:
            for block_hash in ours:
                del self._under_way[block_hash]
            self._num_waiting -= len(pull.waiting)
            for waiting in pull.waiting.values():
                self._enqueue(waiting)

    def close(self) -> None:
        """Forget what waits, and start nothing more."""
        self._is_closing = True
        for line in self._lines.values():
            line.queue.clear()

    async def settle(self) -> None:
        """Waits, with the exchange closed, until the slots that fetches held have been given back.

        A read that never ends keeps its slots, the safe side; it does not keep the disk from being written.
        """
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=_SETTLE_S)
            if pending:
                logger.error("%d fetches do not end, %g s after the exchange", len(pending), _SETTLE_S)

    # ---- whose turn it is ----

    def _enqueue(self, offer: _Offer) -> None:
        """Put an offer at the end of its worker's line; the oldest of the longest line gives way."""
        if self._is_closing:
            return
        line = self._lines.setdefault(offer.peer.peer_id, _Line())
        # The latest word on a chain is the one that counts, and one that begins at its head says all of those before.
        for said_again in offer.hashes if offer.parent_hash is None else offer.hashes[-1:]:
            line.queue.pop(said_again, None)
        while self.num_queued >= _MAX_QUEUED:
            longest = max(self._lines.values(), key=lambda each: len(each.queue))
            if not longest.queue:
                break
            del longest.queue[next(iter(longest.queue))]
            self.stats.num_offers_dropped += 1
        line.queue[offer.hashes[-1]] = offer
        if line.num_tasks < min(len(line.queue), max(1, _MAX_PULLS // 2)):
            line.num_tasks += 1
            self._spawn(self._serve(offer.peer.peer_id, line))

    async def _serve(self, peer_id: str, line: _Line) -> None:
        """Fetch what a worker offers until its line is empty. Dialling it takes no turn."""
        try:
            while line.queue:
                address = next(iter(line.queue.values())).address
                if (problem := await self._dial(peer_id, address)) is not None:
                    self.stats.failures[problem] += len(line.queue)
                    line.queue.clear()
                    return
                async with self._pulls:
                    if line.queue:
                        await self._take_in(line.queue.pop(next(iter(line.queue))))
        finally:
            line.num_tasks -= 1
            if not line.num_tasks:
                del self._lines[peer_id]

    async def _dial(self, peer_id: str, address: str) -> str | None:
        """Connects to the worker; returns why nothing can be fetched from it, or None."""
        try:
            owner = await self._exchange.connect(address)
        except (PeerUnreachable, IncompatiblePeer) as error:
            logger.info("what %s has offered cannot be fetched: %s", peer_id, error)
            return "unreachable"
        if owner != peer_id:
            logger.info("what %s has offered cannot be fetched: %s is %s", peer_id, address, owner)
            return "impostor"
        return None

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="intake")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stats.failures["internal"] += 1
            logger.error("taking in blocks broke", exc_info=error)

    # ---- one offer ----

    def _num_here(self, hashes: Sequence[BlockHash]) -> int:
        """Counts how many from the start are here."""
        return sum(1 for _ in itertools.takewhile(self._is_here, hashes))

    def _is_here(self, block_hash: BlockHash) -> bool:
        return self._store.tier_of(block_hash) is not None

    def _waits(self, offer: _Offer, block_hash: BlockHash) -> bool:
        """Whether this block is being fetched, or doubted: then the offer is queued again when that has ended."""
        pull = self._under_way.get(block_hash)
        if pull is None:
            return False
        if self.num_queued < _MAX_QUEUED:
            self._num_waiting -= len(pull.waiting)
            pull.waiting[offer.peer.peer_id, offer.hashes[-1]] = offer
            self._num_waiting += len(pull.waiting)
        else:
            self.stats.num_offers_dropped += 1
        return True

    async def _take_in(self, offer: _Offer) -> None:
        """Fetch what is missing of the chain, piece by piece, until it is all here or a piece fails."""
        hashes, parent_hash = offer.hashes, offer.parent_hash
        if parent_hash is not None and not self._is_here(parent_hash):
            if not self._waits(offer, parent_hash):
                self.stats.num_orphans += 1
            return
        end = 0  # hashes[:end] were here, or were fetched: each round gets further, or is the last
        while not self._is_closing:
            start = end + self._num_here(hashes[end:])
            next_one = hashes[start : start + 1]
            if any(self._waits(offer, each) for each in next_one or hashes) or not next_one:
                return
            missing = itertools.takewhile(lambda each: not self._is_here(each), hashes[start:])
            piece = list(itertools.takewhile(lambda each: each not in self._under_way, missing))[
                : self._max_pull_blocks
            ]
            # Pinned, the chain that we are about to continue is not what is evicted for its own tail.
            dram, before = self._store.dram, [] if parent_hash is None else [parent_hash]
            pins = dram.match_prefix(before, is_use=False) + dram.match_prefix(hashes[:start], is_use=False)
            try:
                num_pulled = await self._pull_marked(offer, hashes[start - 1] if start else parent_hash, piece)
            finally:
                self._store.unpin(pins)
            if num_pulled < len(piece):
                return
            end = start + num_pulled

    async def _pull_marked(self, offer: _Offer, parent_hash: BlockHash | None, hashes: Sequence[BlockHash]) -> int:
        """`_pull`, with what is being fetched known to the other offers."""
        with self.holding_back(hashes):
            return await self._pull(offer, parent_hash, hashes)

    async def _pull(self, offer: _Offer, parent_hash: BlockHash | None, hashes: Sequence[BlockHash]) -> int:
        """Fetch and publish a run of blocks; how many. Each stage has a deadline in the store or the exchange."""
        slots = await self._store.reserve(len(hashes))
        if not slots:
            self._failed(offer, len(hashes), "no_room", "all of our memory is being read or filled")
            return 0
        unpublished = set(slots)

        async def reserve(num_blocks: int) -> Reservation:
            return Reservation(slots[:num_blocks])

        hashes = hashes[: len(slots)]
        fetch: Fetch | None = None
        try:
            fetch = self._exchange.fetch_prefix(
                self._exchange.new_id(), offer.peer.peer_id, hashes, reserve, offer.peer.incarnation
            )
            result = await fetch.result
            if result.failure is not None:
                self._failed(offer, len(hashes), result.failure.cause.value, result.failure.detail)
                return 0
            known_by = await self._threads.run(functools.partial(checksums, self._store.memory, result.block_ids))
            for slot, block_hash, proof, checksum in zip(
                result.block_ids, hashes, result.proofs, known_by, strict=False
            ):
                unpublished.discard(slot)
                self._store.publish(slot, block_hash, parent_hash, proof, checksum)
                parent_hash = block_hash
            self.stats.num_pulled_blocks += len(result.block_ids)
            self.stats.num_pulled_bytes += result.num_bytes
            return len(result.block_ids)
        except PeerLost as error:
            self._failed(offer, len(hashes), "unreachable", str(error))
            return 0
        finally:
            self._spawn(self._abandon(fetch, unpublished))

    async def _abandon(self, fetch: Fetch | None, slots: set[int]) -> None:
        """Give slots back once nobody writes to them any more."""
        if fetch is not None:
            fetch.abort("given up")
            await fetch.quiesced
        self._store.abandon(slots)

    def _failed(self, offer: _Offer, num_blocks: int, cause: str, detail: str) -> None:
        self.stats.failures[cause] += 1
        logger.info("%d blocks offered by %s did not come: %s", num_blocks, offer.peer.peer_id, detail)
