"""The buffers of a link whose blocks are in pieces: bounded, and copied without holding up the loop."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvstore.transport import STEP_BYTES, staging
from kvstore.transport.staging import Arrivals, Buffers, Room
from tests.pieces import piece_memory, read_all, write_all

BLOCK_BYTES = 48


def some_blocks() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (9, BLOCK_BYTES), np.uint8)


async def test_room_is_bounded_and_whoever_waits_gets_it_in_the_end() -> None:
    room = Room(max_bytes=4)
    await room.reserve(3)
    await room.reserve(1)
    waiting = asyncio.ensure_future(room.reserve(2))
    room.free(1)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    room.free(3)
    async with asyncio.timeout(20):
        await waiting
        room.free(2)
        await room.reserve(9)  # more than the bound: alone
    waiting = asyncio.ensure_future(room.reserve(1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    room.free(9)
    await asyncio.wait_for(waiting, 20)


async def test_blocks_are_copied_step_by_step_and_others_have_the_loop_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MAX_STEP_BYTES", 2 * BLOCK_BYTES)
    memory, blocks = piece_memory(3, 9, BLOCK_BYTES), some_blocks()
    write_all(memory, blocks)
    buffers, num_turns = Buffers(memory), 0

    async def take_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    others = asyncio.ensure_future(take_turns())
    buffer = await buffers.gather(2, 7)
    assert num_turns >= 3, "four steps"
    assert isinstance(buffer, np.ndarray)
    assert buffer.tobytes() == blocks[2:9].tobytes()
    await buffers.scatter(0, 7, buffer)
    assert num_turns >= 6
    others.cancel()
    blocks[:7] = blocks[2:9].copy()
    assert (read_all(memory) == blocks).all()


def test_buffers_are_used_again_and_those_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MAX_BYTES", 4 * BLOCK_BYTES)
    buffers = Buffers(piece_memory(3, 9, BLOCK_BYTES))
    pair = [buffers.take(2), buffers.take(2)]
    assert pair[0] is not pair[1]
    for each in pair:
        buffers.give_back(2, each)
    assert buffers.take(2) is pair[1]
    assert buffers.take(1) is not pair[0]
    buffers.give_back(3, three := buffers.take(3))  # drops the one of two
    assert buffers.take(2) is not pair[0]
    assert buffers.take(3) is three


def test_what_comes_into_a_buffer_shows_before_all_of_it_is_there() -> None:
    arrivals, buffer = Arrivals(), np.zeros(3 * STEP_BYTES + 4096, np.uint8)
    arrivals.begin(7, buffer)
    seen = [arrivals.num_come]
    for come in (4096, STEP_BYTES, 2 * STEP_BYTES + 8, len(buffer)):
        buffer[:come] = 1
        seen.append(arrivals.num_come)
    assert seen == [0, 0, 1, 2, 4]
    arrivals.end(7)
    arrivals.begin(8, buffer)
    assert arrivals.num_come == 4
    arrivals.end(8)  # the link was aborted, say
    assert arrivals.num_come >= 4
