"""The worker's feed: follows the registry's store nodes, and offers each its chains, also after it forgot them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from kvstore.block import BlockHash
from kvstore.pool.slot_book import CacheChange, CacheEvent
from kvstore.registry import WorkerRecord
from kvstore.store import StoreNode, StoreTier
from services.worker.store import StoreFeed
from services.worker.store.chain_book import ChainOffer
from tests.store_node.store_world import LAYOUT, Worker, chain, until, world
from tests.tiers.blocks import locate
from tests.worker_records import worker_record


class Registry:
    """Stands in for `Membership`: the test says who is there."""

    def __init__(self) -> None:
        self._callback: Callable[[Sequence[WorkerRecord]], None] = lambda _: None

    def on_change(self, callback: Callable[[Sequence[WorkerRecord]], None]) -> None:
        self._callback = callback

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def list(self, *records: WorkerRecord) -> None:
        self._callback(records)


def record_of(node: StoreNode, fingerprint: str = LAYOUT.model_fingerprint) -> WorkerRecord:
    layout = LAYOUT.to_wire() | {"model_fingerprint": fingerprint}
    return worker_record(
        worker_id=node.identity.peer_id.partition("/")[0],
        role="store",
        incarnation=node.identity.incarnation,
        model_fingerprint=fingerprint,
        kv_address=node.exchange.address,
        block_size=LAYOUT.block_size,
        transports=("memory",),
        layout=layout,
    )


def make_feed(worker: Worker, counts: Counter[str]) -> tuple[StoreFeed, Registry]:
    registry = Registry()

    def count(outcome: str, number: int) -> None:
        counts[outcome] += number

    return StoreFeed(registry, worker.exchange, 64, False, count), registry  # type: ignore[arg-type]


def compute(worker: Worker, feed: StoreFeed, hashes: list[BlockHash]) -> None:
    """The worker's cache gets a chain."""
    worker.hold(hashes)
    parents = [None, *hashes[:-1]]
    feed.changed([CacheChange(h, CacheEvent.PUBLISHED, p) for h, p in zip(hashes, parents, strict=True)])


async def test_what_a_worker_computes_reaches_the_node_and_a_restarted_node_gets_it_anew() -> None:
    async with world() as made:
        worker, node = await made.worker(), await made.node()
        counts: Counter[str] = Counter()
        feed, registry = make_feed(worker, counts)
        early, late = chain("early", 3), chain("late", 3)
        await feed.start(worker.exchange.address)
        compute(worker, feed, early)  # before there is any node
        registry.list(record_of(node))
        compute(worker, feed, late)
        await until(lambda: len(node.store.dram) == 6)

        await node.close()
        again = await made.node(incarnation="2")
        registry.list(record_of(again))
        await until(lambda: len(again.store.dram) == 6)
        for hashes in (early, late):
            assert locate(again.store, hashes) == [StoreTier.DRAM] * 3
        assert counts["dropped"] == 0
        await feed.close()


async def test_a_node_of_another_model_is_offered_nothing() -> None:
    async with world() as made:
        worker, node = await made.worker(), await made.node()
        counts: Counter[str] = Counter()
        feed, registry = make_feed(worker, counts)
        await feed.start(worker.exchange.address)
        registry.list(record_of(node, fingerprint="cd34"))
        assert feed.state() == {"num_blocks": 0, "nodes": {}}
        await feed.close()


async def test_a_node_that_cannot_be_reached_costs_a_bounded_queue_and_no_one_else() -> None:
    async with world() as made:
        worker, node, dead = await made.worker(), await made.node(), await made.node(incarnation="9")
        await dead.close()
        counts: Counter[str] = Counter()
        feed, registry = make_feed(worker, counts)
        await feed.start(worker.exchange.address)
        gone = record_of(dead)
        registry.list(record_of(node), msgspec.structs.replace(gone, worker_id="store-9"))
        for i in range(16):
            compute(worker, feed, chain(f"c{i}", 2))
        await until(lambda: node.intake.stats.num_pulled_blocks > 0 and node.intake.is_idle)
        await until(lambda: counts["sent"] + feed.state()["nodes"]["store-9"]["num_queued"] == 16)  # type: ignore[index]
        assert counts["sent"] > 0
        await feed.close()


async def test_a_chain_that_grows_while_its_node_is_away_is_one_offer() -> None:
    async with world() as made:
        worker, dead = await made.worker(), await made.node()
        await dead.close()
        feed, registry = make_feed(worker, Counter())
        await feed.start(worker.exchange.address)
        registry.list(record_of(dead))
        line, hashes = feed._nodes["store-0"], chain("a", 40)
        for length in range(1, 41):
            line.put(ChainOffer(None, tuple(hashes[:length])))
        line.put(ChainOffer(hashes[-1], tuple(chain("b", 2))))
        assert [len(offer.hashes) for offer in line.queue.values()] == [40, 2]
        await feed.close()


def break_once(function: Callable[..., Any]) -> Callable[..., Any]:
    failures = iter([RuntimeError("a bug of ours")])

    def broken(*args: Any) -> Any:
        for failure in failures:
            raise failure
        return function(*args)

    return broken


async def test_a_feed_that_breaks_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.store.store_feed._RETRY_S", 0.01)
    async with world() as made:
        worker, node = await made.worker(), await made.node()
        feed, registry = make_feed(worker, Counter())
        monkeypatch.setattr(worker.exchange, "tell_have", break_once(worker.exchange.tell_have))
        monkeypatch.setattr(feed._book, "take_grown", break_once(feed._book.take_grown))
        await feed.start(worker.exchange.address)
        registry.list(record_of(node))
        last = chain("last", 2)
        compute(worker, feed, chain("first", 2))
        async with asyncio.timeout(20):
            while locate(node.store, last) == []:
                compute(worker, feed, last)
                feed._book.grow_all()
                await asyncio.sleep(0.05)
        await feed.close()
