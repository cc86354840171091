"""Tells store nodes what the worker's cache holds; the nodes fetch what they want.

    cache changes -> chain book -> (50 ms, so that a prompt's chunks join) -> the node of each chain -> `have`

The engine takes no part in it and never waits for it. Every worker offers a chain to the same node
(chain_placement.py). A node that is new, or that was restarted and has forgotten, is offered all that is cached here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from kvstore.block import BlockHash
from kvstore.errors import IncompatiblePeer, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange
from kvstore.pool import CacheChange
from kvstore.registry import Membership, WorkerRecord
from services.worker.store.chain_book import ChainBook, ChainOffer
from services.worker.store.chain_placement import node_of_chain

log = logging.getLogger(__name__)

_GATHER_S: Final = 0.05
_RETRY_S: Final = 2.0  # until a node that could not be reached is tried again
_MAX_QUEUED: Final = 4096  # chains that wait for one node; the oldest give way
_BURST: Final = 64  # offers between two pauses, so that neither side's event loop is flooded
_PAUSE_S: Final = 0.01

Count = Callable[[str, int], None]


class StoreFeed:
    """Follows the store nodes of our layout and offers them our chains. All methods belong to the event loop."""

    def __init__(
        self, membership: Membership, exchange: BlockExchange, max_blocks: int, only_reused: bool, count: Count
    ) -> None:
        """Owns `membership`. `count(outcome, number)` is called for offers that were "sent" or "dropped"."""
        self._membership = membership
        self._exchange = exchange
        self._layout = exchange.identity.layout.to_wire()
        self._book = ChainBook(2 * max_blocks, only_reused)
        self._count = count
        self._address = ""
        self._nodes: dict[str, _NodeLine] = {}
        self._has_grown = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended: set[asyncio.Task[None]] = set()

    async def start(self, address: str) -> None:
        """Follow the nodes from now on; `address` is where they may fetch our blocks."""
        self._address = address
        self._membership.on_change(self._follow)
        await self._membership.start()
        self._task = asyncio.create_task(_keep_going(self._run, "the store feed"), name="store-feed")

    async def close(self) -> None:
        """Stop offering."""
        await self._membership.close()
        lines = [line.task for line in self._nodes.values()]
        tasks = [*lines, *self._ended] if self._task is None else [self._task, *lines, *self._ended]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def changed(self, changes: Sequence[CacheChange]) -> None:
        """The paged cache has changed."""
        self._book.apply(changes)
        if self._book.has_grown:
            self._has_grown.set()

    def state(self) -> dict[str, object]:
        """Return the state for /debug/state."""
        return {
            "num_blocks": len(self._book),
            "nodes": {node_id: {"num_queued": len(line.queue)} for node_id, line in self._nodes.items()},
        }

    def _follow(self, records: Sequence[WorkerRecord]) -> None:
        """Open lines to new nodes, end those to nodes that left; on any change every chain is offered anew.

        Those whose node has not changed cost that node a glance at its table.
        """
        nodes = {
            record.worker_id: record for record in records if record.role == "store" and record.layout == self._layout
        }
        has_changed = False
        for node_id, line in list(self._nodes.items()):
            record = nodes.get(node_id)
            if record is None or record.incarnation != line.record.incarnation:
                del self._nodes[node_id]
                line.task.cancel()
                self._ended.add(line.task)
                line.task.add_done_callback(self._ended.discard)
                has_changed = True
        for node_id, record in nodes.items():
            if node_id not in self._nodes:
                self._nodes[node_id] = _NodeLine(record, self._exchange, self._address, self._count)
                has_changed = True
        if has_changed and self._nodes:
            self._book.grow_all()
            self._has_grown.set()

    async def _run(self) -> None:
        while True:
            await self._has_grown.wait()
            await asyncio.sleep(_GATHER_S)
            self._has_grown.clear()
            while self._nodes and (offers := self._book.take_grown(_BURST)):
                for offer in offers:
                    self._nodes[node_of_chain(offer, self._nodes)].put(offer)
                await asyncio.sleep(0)  # for a newcomer that may be all that is cached
            if not self._nodes:
                self._book.forget_growth()  # the first node to come is offered everything


async def _keep_going(run: Callable[[], Awaitable[None]], what: str) -> None:
    """Run a loop that ends by cancellation alone: a bug of ours costs the offers that it met, and not all to come."""
    while True:
        try:
            await run()
        except Exception:
            log.exception("%s broke, and begins again", what)
        await asyncio.sleep(_RETRY_S)


class _NodeLine:
    """The queue of what to say to one start of one node, and the task that says it."""

    def __init__(self, record: WorkerRecord, exchange: BlockExchange, our_address: str, count: Count) -> None:
        self.record = record
        self.queue: dict[BlockHash, ChainOffer] = {}  # by the end of the chain, in order
        self._exchange = exchange
        self._our_address = our_address
        self._count = count
        self._has_queued = asyncio.Event()
        name = f"offers to {record.worker_id}"
        self.task = asyncio.create_task(_keep_going(self._run, name), name=name)

    def put(self, offer: ChainOffer) -> None:
        # One that begins at the head of its chain says all of those before.
        for said_again in offer.hashes if offer.parent_hash is None else offer.hashes[-1:]:
            self.queue.pop(said_again, None)
        while len(self.queue) >= _MAX_QUEUED:
            del self.queue[next(iter(self.queue))]
            self._count("dropped", 1)
        self.queue[offer.hashes[-1]] = offer
        self._has_queued.set()

    async def _run(self) -> None:
        while True:
            await self._has_queued.wait()
            try:
                peer_id = await self._exchange.connect(self.record.kv_address)
                num_sent = 0
                while self.queue and num_sent < _BURST:
                    end = next(iter(self.queue))
                    offer = self.queue[end]
                    del self.queue[end]
                    try:
                        self._exchange.tell_have(peer_id, self._our_address, offer.parent_hash, offer.hashes)
                    except PeerLost:
                        self.queue = {end: offer} | self.queue
                        raise
                    num_sent += 1
            except (PeerUnreachable, PeerLost, IncompatiblePeer) as error:
                log.info("store node %s cannot be told of our blocks: %s", self.record.worker_id, error)
                await asyncio.sleep(_RETRY_S)
                continue
            self._count("sent", num_sent)
            if not self.queue:
                self._has_queued.clear()
            await asyncio.sleep(_PAUSE_S)
