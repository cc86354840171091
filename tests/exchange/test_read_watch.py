"""A link that brings no byte of what is read ends its connection; one that brings any, ever so slowly, does not."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from kvstore.block import BlockHash, HostMemory, PieceMemory, Run
from kvstore.exchange.read_watch import ReadWatch
from kvstore.protocol import (
    AnnouncedBlock,
    ExchangeTimeouts,
    FetchCause,
    FetchMachine,
    FetchState,
    Reservation,
    Reserved,
)
from kvstore.protocol.fetch_events import ReadEnded
from kvstore.protocol.machine import Timer
from kvstore.protocol.messages import Announce, Offer
from kvstore.transport.marks import MARK
from tests.exchange.exchange_worker import PATIENT, TRANSFER, Worker, room, running, some_hashes
from tests.memory_transport import Faults, Switchboard
from tests.pieces import piece_memory

ALLOWED_S = 2.0
BLOCK_BYTES = 256 * 1024
RUNS = [Run(remote_first=0, local_first=2, num_blocks=3), Run(remote_first=7, local_first=7, num_blocks=1)]


@dataclass
class Link:
    """What a watch reads of one."""

    num_messages: int = 0
    num_turns: int | None = None


class Watched:
    """A watch whose time is given."""

    def __init__(self, memory: HostMemory | PieceMemory | None = None) -> None:
        self.link = Link()
        self.memory = memory or HostMemory.allocate(8, BLOCK_BYTES)
        self.watch = ReadWatch(self.memory, self.link, lambda: self.link.num_turns, ALLOWED_S, 0.5)  # type: ignore[arg-type]
        self.now_s = 0.0

    def after(self, seconds: float) -> str | None:
        for _ in range(round(seconds / 0.5)):
            self.now_s += 0.5
            self.watch.look(self.now_s)
        return self.watch.problem()


def test_a_link_that_brings_nothing_stands_still_after_what_is_allowed() -> None:
    watched = Watched()
    assert watched.after(60) is None  # nothing is to be read
    watched.watch.begin(1, RUNS)
    assert watched.after(2.5) is None
    problem = watched.after(0.5)
    assert problem is not None
    assert "1 reads, and no byte for 2.5 s" in problem


def test_a_link_that_brings_64_kib_in_two_seconds_is_never_in_the_way() -> None:
    watched = Watched()
    watched.watch.begin(1, RUNS)
    arrived = watched.memory.array.reshape(-1)
    for end in range(2 * BLOCK_BYTES, 5 * BLOCK_BYTES, 65536):
        arrived[end : end + 65536] = 0
        assert watched.after(2.0) is None, end
    for end in range(7 * BLOCK_BYTES, 8 * BLOCK_BYTES, 65536):
        arrived[end : end + 65536] = 0
        assert watched.after(2.0) is None, end
    watched.watch.end(1)
    assert watched.after(60) is None


@pytest.mark.parametrize(("num_pieces", "num_regions"), [(3, 1), (24, 1), (24, 4)])
@pytest.mark.parametrize("is_scattered", [False, True])
def test_a_slow_link_is_left_alone_whose_blocks_are_in_pieces_too(
    num_pieces: int, num_regions: int, is_scattered: bool
) -> None:
    """All first pieces may come before any second one."""
    memory = piece_memory(num_pieces, 32, 192 * 1024, num_regions=num_regions)
    watched = Watched(memory)
    runs = [Run(0, block_id, 1) for block_id in range(0, 32, 2)] if is_scattered else [Run(0, 2, 16)]
    watched.watch.begin(1, runs)
    num_bytes, since = 0, 0
    for piece in range(num_pieces):
        for run in runs:
            for block_id in range(run.local_first, run.local_first + run.num_blocks):
                memory.view(block_id, region=piece % num_regions)[piece // num_regions] = 0
                num_bytes += memory.geometry.piece_bytes
                if num_bytes - since >= 2 * 65536:
                    since = num_bytes
                    assert watched.after(2.0) is None, (piece, block_id)
    assert num_bytes == 16 * 192 * 1024
    watched.watch.end(1)
    assert watched.after(60) is None


def test_what_has_come_is_no_news_a_second_time() -> None:
    watched = Watched()
    watched.watch.begin(1, RUNS)
    watched.memory.array[2] = 0
    assert watched.watch.look(0.5)
    assert not watched.watch.look(1.0)
    watched.now_s = 1.0
    assert watched.after(2.5) is not None


def test_a_read_that_ends_moves_the_link_and_one_that_is_dropped_does_not() -> None:
    watched = Watched()
    for read_id, run in enumerate(RUNS):
        watched.watch.begin(read_id, [run])
    watched.watch.drop(0)
    assert not watched.watch.look(0.0)
    watched.watch.end(0)
    assert not watched.watch.look(0.0)
    watched.watch.end(1)
    assert watched.watch.look(0.0)
    assert not watched.watch.is_reading


def test_a_link_is_not_to_blame_where_our_own_thread_does_not_come_round() -> None:
    watched = Watched()
    watched.link.num_turns = 7
    watched.watch.begin(1, RUNS)
    assert watched.after(60) is None
    for _ in range(6):
        watched.link.num_turns += 1
        problem = watched.after(0.5)
    assert problem is not None


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_mark_that_is_left_in_a_block_is_a_small_number(dtype: torch.dtype) -> None:
    """Attention gives what is not computed yet a weight of 0, and 0 times a NaN is no 0: a request ended by that."""
    numbers = torch.frombuffer(bytearray(MARK.tobytes()), dtype=dtype).float()
    assert bool(torch.isfinite(numbers).all())
    assert float(numbers.abs().max()) < 1000


def test_of_a_pause_of_our_own_little_counts() -> None:
    watched = Watched()
    watched.watch.begin(1, RUNS)
    watched.watch.look(0.0)
    watched.watch.look(3600.0)
    assert watched.watch.problem() is None


class DeviceMemory(HostMemory):
    device = "cuda:0"  # type: ignore[assignment]


def test_on_a_device_messages_count_and_may_take_as_long_as_they_are() -> None:
    memory = DeviceMemory(np.zeros((8, 4 << 20), np.uint8))
    watched = Watched(memory)
    watched.watch.begin(1, RUNS)  # at most 12 MiB in one piece
    assert watched.after(12) is None
    watched.link.num_messages += 1
    assert watched.after(12) is None
    assert watched.after(4) is not None


def reading() -> FetchMachine:
    """A fetch of one block, which is read; at 4 s that has taken too long."""
    timeouts, block_hash = ExchangeTimeouts(read_s=4), BlockHash(bytes(16))
    machine = FetchMachine(TRANSFER, [block_hash], 4096, timeouts, itertools.count(1).__next__, now=0.0)
    machine.handle(Offer(TRANSFER, 1), 0.0)
    machine.handle(Reserved(Reservation([3])), 0.0)
    machine.handle(Announce(TRANSFER, 0, [AnnouncedBlock(7, block_hash, 1)], True), 0.0)
    return machine


def test_a_read_has_its_time_from_the_last_byte_on() -> None:
    machine = reading()
    for now in range(3, 60, 3):
        machine.bytes_came(now)
        assert machine.handle(Timer(), now + 3.5) == []
    machine.handle(Timer(), 62.0)
    assert machine.state is FetchState.DRAINING


def test_a_check_has_its_time_whatever_comes_over_the_link() -> None:
    """Who reads elsewhere on a busy link says nothing of a check that hangs."""
    machine = reading()
    machine.handle(ReadEnded(next(iter(machine.reads))), 1.0)
    machine.bytes_came(4.0)
    machine.handle(Timer(), 5.5)
    assert machine.state is FetchState.DRAINING


@pytest.mark.parametrize("num_blocks", [1, 5])
async def test_a_stalled_link_ends_its_fetches_long_before_the_deadline_of_a_read(num_blocks: int) -> None:
    switchboard = Switchboard()
    patient = replace(PATIENT, read_s=600.0, announce_s=600.0, peer_timeout_s=1.0, heartbeat_s=0.05)
    owner = Worker("prefill-0", switchboard, timeouts=patient)
    reader = Worker("decode-0", switchboard, timeouts=patient, faults=Faults(stall=1.0))
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        hashes, blocks = some_hashes(num_blocks), list(range(1, num_blocks + 1))
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", hashes, room(blocks))
        lease = owner.exchange.open_lease(TRANSFER, "decode-0", num_blocks)
        lease.announce(0, owner.announced(blocks, hashes), last=True)
        async with asyncio.timeout(60):
            failure = (await fetch.result).failure
            assert failure is not None
            assert failure.cause is FetchCause.PEER_LOST
            assert "the link stands still" in failure.detail
            assert await fetch.quiesced == blocks
            await lease.closed
