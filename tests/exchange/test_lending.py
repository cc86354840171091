"""Prefix fetches: a reader names hashes, an owner lends the longest prefix of them that it holds."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO

import numpy as np

from kvstore.block import BlockHash, Proof
from kvstore.protocol import AnnouncedBlock, FetchCause, FetchState, Reservation
from services.logs import TextFormatter, current_request_id, request_scope
from tests.exchange.exchange_worker import TRANSFER, Worker, room, running
from tests.memory_transport import Faults, Switchboard
from tests.proofs import prove
from tests.waiting import until

HASHES = [BlockHash(bytes([i]) * 16) for i in range(10)]
WAIT_S = 60.0


class Shelf:
    """A lender that holds the first blocks of HASHES, and books what it has lent."""

    def __init__(self, num_held: int, wrong_proof: bool = False) -> None:
        self.slots = {block_hash: 20 + i for i, block_hash in enumerate(HASHES[:num_held])}
        self.wrong_proof = wrong_proof
        self.worker: Worker | None = None
        self.num_pinned = 0
        self.suspected: list[BlockHash] = []
        self.asked_for: list[str] = []  # the requests

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        self.asked_for.append(current_request_id())
        held = []
        for block_hash in hashes:
            if block_hash not in self.slots:
                break
            held.append(block_hash)
        block_ids = [self.slots[block_hash] for block_hash in held]
        proofs = prove(self.worker.memory, block_ids, held)
        self.num_pinned += len(held)
        return [
            AnnouncedBlock(block_id, block_hash, Proof(proof ^ self.wrong_proof))
            for block_id, block_hash, proof in zip(block_ids, held, proofs, strict=True)
        ]

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        self.num_pinned -= len(blocks)

    async def recheck(self, hashes: Sequence[BlockHash]) -> None:
        self.suspected += hashes


def make_pair(shelf: Shelf, faults: Faults | None = None) -> tuple[Worker, Worker]:
    switchboard = Switchboard()
    owner = Worker("store-0", switchboard, lender=shelf, request_scope=request_scope)
    shelf.worker = owner
    return owner, Worker("prefill-0", switchboard, faults=faults)


@contextmanager
def debug_log(of: str) -> Iterator[StringIO]:
    """What a logger writes, as the services write it."""
    text, logger = StringIO(), logging.getLogger(of)
    handler = logging.StreamHandler(text)
    handler.setFormatter(TextFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield text
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


async def settled(shelf: Shelf) -> None:
    await until(lambda: shelf.num_pinned == 0)


async def test_the_longest_held_prefix_is_lent_and_read() -> None:
    shelf = Shelf(num_held=6)
    owner, reader = make_pair(shelf)
    asked: list[int] = []

    async def reserve(num_blocks: int) -> Reservation:
        asked.append(num_blocks)
        return Reservation(list(range(num_blocks)), 0)

    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        result = await reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES, reserve).result
        assert result.ok, result.failure
        assert asked == [6]
        assert result.block_ids == list(range(6))
        np.testing.assert_array_equal(reader.memory.array[:6], owner.memory.array[20:26])
        await settled(shelf)


async def test_a_holder_knows_whose_prompt_it_lends_for_and_says_so_in_its_log_and_its_state() -> None:
    shelf = Shelf(num_held=2)
    owner, reader = make_pair(shelf)
    leases: list[object] = []

    async def reserve(num_blocks: int) -> Reservation:
        leases.extend(owner.exchange.state()["leases"])
        return Reservation(list(range(num_blocks)), 0)

    with debug_log("kvstore.exchange.owner") as log:
        async with running(owner, reader):
            await reader.exchange.connect(owner.exchange.address)
            for request_id in ("chatcmpl-7", "", "x" * 500):
                fetch = reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES[:2], reserve, request_id=request_id)
                assert (await fetch.result).ok
                await settled(shelf)
    assert shelf.asked_for == ["chatcmpl-7", "", "x" * 256]
    assert [lease["request_id"] for lease in leases] == shelf.asked_for
    first, second, _ = log.getvalue().splitlines()
    assert first.endswith("lent 2 of 2 blocks to prefill-0: CONFIRMED  request_id=chatcmpl-7")
    assert "request_id" not in second


async def test_a_holder_of_an_older_version_is_not_told_whose_prompt_it_lends_for(monkeypatch) -> None:
    monkeypatch.setattr("kvstore.exchange.handshake.FEATURES", ())
    shelf = Shelf(num_held=2)
    owner, reader = make_pair(shelf)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch = reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES, room([1, 2]), request_id="chatcmpl-7")
        assert (await fetch.result).ok
    assert shelf.asked_for == [""]


async def test_a_holder_that_has_evicted_it_all_says_so_at_once() -> None:
    shelf = Shelf(num_held=0)
    owner, reader = make_pair(shelf)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        result = await reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES, room([1])).result
        assert result.failure.cause is FetchCause.REVOKED
        assert result.failure.stage == "offer"


async def test_a_worker_without_a_lender_says_so() -> None:
    switchboard = Switchboard()
    owner, reader = Worker("store-0", switchboard), Worker("prefill-0", switchboard)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        result = await reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES, room([1])).result
        assert result.failure.cause is FetchCause.REVOKED


async def test_a_holder_that_lies_is_found_out_and_its_blocks_are_unpinned() -> None:
    shelf = Shelf(num_held=3, wrong_proof=True)
    owner, reader = make_pair(shelf)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch = reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES, room([1, 2, 3]))
        result = await fetch.result
        assert result.failure.cause is FetchCause.DIGEST_MISMATCH
        assert await fetch.quiesced == [1, 2, 3]
        await settled(shelf)
    assert shelf.suspected == HASHES[:3], "the holder is told"


async def test_a_holder_of_an_older_version_is_not_told_what_is_wrong(monkeypatch) -> None:
    monkeypatch.setattr("kvstore.exchange.handshake.FEATURES", ())
    shelf = Shelf(num_held=3, wrong_proof=True)
    owner, reader = make_pair(shelf)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        result = await reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES, room([1, 2, 3])).result
        assert result.failure.cause is FetchCause.DIGEST_MISMATCH
        await settled(shelf)
        assert reader.exchange.is_connected("store-0")
    assert shelf.suspected == []


async def test_a_reader_that_goes_away_leaves_nothing_pinned() -> None:
    shelf = Shelf(num_held=8)
    owner, reader = make_pair(shelf, Faults(stall=1.0))
    async with running(owner):
        async with running(reader):
            await reader.exchange.connect(owner.exchange.address)
            fetch = reader.exchange.fetch_prefix(TRANSFER, "store-0", HASHES, room(list(range(8))))
            await until(lambda: fetch.machine.state is FetchState.READING)
        assert (await fetch.result).failure is not None
        await settled(shelf)
