"""Turns in the tokenizer's threads: client after client, long work beside short, and nothing for who has gone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvstore.threads import OsThreads
from services.router.errors import ApiError
from services.router.text import LONG_CHARS, TokenizerPool, WorkStopped


class Gate:
    """Work that begins when it begins and ends when it may."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, go_on) -> str:
        self.begun.set()
        assert self.may_end.wait(20)
        go_on()
        return "done"


@pytest.fixture
def make_pool():
    pools = []

    def make(num_threads=1, max_queue=100, **options):
        pools.append(TokenizerPool(OsThreads(), num_threads, max_queue, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


async def test_clients_take_turns(make_pool):
    pool, gate, order = make_pool(), Gate(), []
    first = asyncio.create_task(pool.run(gate, "busy"))
    asked = [("busy", 1), ("busy", 2), ("busy", 3), ("other", 1), ("third", 1), ("other", 2)]
    rest = [asyncio.create_task(pool.run(lambda go_on, each=each: order.append(each), each[0])) for each in asked]
    await asyncio.sleep(0)
    gate.may_end.set()
    await asyncio.gather(first, *rest)
    assert order == [("busy", 1), ("other", 1), ("third", 1), ("busy", 2), ("other", 2), ("busy", 3)]


async def test_long_work_leaves_a_thread_to_short_work(make_pool):
    pool, long = make_pool(num_threads=2), [Gate(), Gate()]
    works = [asyncio.create_task(pool.run(gate, "busy", LONG_CHARS)) for gate in long]
    assert await pool.run(lambda go_on: "short", "busy") == "short"
    assert not long[1].begun.is_set()
    for gate in long:
        gate.may_end.set()
    assert await asyncio.gather(*works) == ["done", "done"]


async def test_the_only_thread_takes_long_work_too(make_pool):
    assert await make_pool().run(lambda go_on: 5, "", LONG_CHARS) == 5


async def test_one_client_does_not_fill_the_queue(make_pool):
    pool, gate = make_pool(max_queue=3, client_share=0.5), Gate()
    works = [asyncio.create_task(pool.run(gate, "busy")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError, match="2 of them yours") as caught:
        await pool.run(gate, "busy")
    assert caught.value.status == 429
    gate.may_end.set()
    assert await pool.run(lambda go_on: 5, "other") == 5
    await asyncio.gather(*works)


async def test_what_has_not_begun_is_dropped_when_its_client_goes(make_pool):
    pool, gate, begun = make_pool(max_queue=1), Gate(), []
    running = asyncio.create_task(pool.run(gate))
    waiting = asyncio.create_task(pool.run(lambda go_on: begun.append(1)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    last = asyncio.create_task(pool.run(lambda go_on: 5))  # there is room for it now
    await asyncio.sleep(0)
    gate.may_end.set()
    assert (await running, await last, begun) == ("done", 5, [])


async def test_what_runs_stops_where_it_looks_once_its_client_has_gone(make_pool):
    pool, begun, stopped = make_pool(), threading.Event(), threading.Event()

    def endless(go_on):
        try:
            while True:
                begun.set()
                go_on()
        except WorkStopped:
            stopped.set()
            raise

    running = asyncio.create_task(pool.run(endless))
    await asyncio.to_thread(begun.wait, 20)
    running.cancel()
    await asyncio.wait([running])
    assert await pool.run(lambda go_on: 5) == 5
    assert stopped.is_set()
