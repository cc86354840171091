"""Tenants' limits: one arithmetic in Redis and here, for all routers together, and without Redis a part for each."""

from __future__ import annotations

import asyncio
import random

import pytest
import redis.asyncio

from kvstore.registry import open_home
from services.router.sharing import Quotas, Share, headers
from services.router.sharing.quota import Book, Verdict, duration, wait_s
from tests.ports import free_port


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_lets_a_burst_through_and_then_so_many_a_minute() -> None:
    share, clock = Share(requests_per_minute=6), Clock()
    book = Book.full(share, clock())
    verdicts = [book.take(share, str(n), 0, 60, clock()) for n in range(8)]
    assert [each.refused for each in verdicts] == [""] * 6 + ["requests"] * 2
    assert wait_s(share, verdicts[-1], 0) == pytest.approx(10)
    clock.now_s += 10
    assert [book.take(share, str(n), 0, 60, clock()).refused for n in (8, 9)] == ["", "requests"]


def test_unused_tokens_come_back_and_more_than_was_taken_is_paid_later() -> None:
    share, clock = Share(tokens_per_minute=600), Clock()
    book = Book.full(share, clock())
    assert book.take(share, "a", 500, 60, clock()).tokens == 100
    assert book.take(share, "b", 200, 60, clock()).refused == "tokens"
    book.settle(share, "a", 400, clock())
    assert book.take(share, "b", 200, 60, clock()).tokens == 300
    book.settle(share, "b", -900, clock())
    refused = book.take(share, "c", 100, 60, clock())
    assert (refused.refused, refused.tokens, wait_s(share, refused, 100)) == ("tokens", -600, pytest.approx(70))


def test_a_lease_ends_by_itself_where_nobody_ends_it() -> None:
    share, clock = Share(max_concurrent=2), Clock()
    book = Book.full(share, clock())
    assert [book.take(share, name, 0, 30, clock()).refused for name in "abc"] == ["", "", "concurrent"]
    book.settle(share, "a", 0, clock())
    assert book.take(share, "c", 0, 60, clock()).refused == ""
    clock.now_s += 31  # b's router is gone
    assert book.take(share, "d", 0, 30, clock()).num_running == 2


def test_headers_are_openais() -> None:
    share = Share(requests_per_minute=60, tokens_per_minute=6000)
    assert dict(headers(share, Verdict("", 59, 0, 1))) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"0",
        b"x-ratelimit-reset-tokens": b"1m0s",
    }
    assert headers(Share(max_concurrent=3), Verdict("", 0, 0, 1)) == []
    assert [duration(seconds) for seconds in (0, 0.02, 1.5, 360)] == ["0ms", "20ms", "1.5s", "6m0s"]


@pytest.mark.parametrize("seed", range(4))
async def test_redis_says_what_the_arithmetic_here_says(redis_url, seed) -> None:
    draw, clock = random.Random(seed), Clock()
    # So few a minute that a bucket gains nothing to speak of while this runs.
    share = Share(requests_per_minute=draw.choice([0, 9]), tokens_per_minute=draw.choice([0, 30]), max_concurrent=4)
    book, running = Book.full(share, clock()), []
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        quotas = Quotas(client, "router-1", clock, timeout_s=30)
        for number in range(40):
            if running and draw.random() < 0.4:
                taken = running.pop(draw.randrange(len(running)))
                used = draw.randrange(8)
                await quotas.settle(taken, used)
                book.settle(share, taken.request, taken.num_tokens - used, clock())
                continue
            taken = await quotas.take("t", share, str(number), 2 * draw.randrange(4), 600)
            expected = book.take(share, str(number), taken.num_tokens, 600, clock())
            assert not taken.is_local
            assert (taken.verdict.refused, taken.verdict.num_running) == (expected.refused, expected.num_running)
            # It has gained by the second, ours not at all.
            assert taken.verdict.requests == pytest.approx(expected.requests, abs=0.9)
            assert taken.verdict.tokens == pytest.approx(expected.tokens, abs=1.9)
            if not taken.verdict.refused:
                running.append(taken)


async def test_two_routers_share_one_limit(redis_url) -> None:
    share, clock = Share(requests_per_minute=3, max_concurrent=10), Clock()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        first, second = Quotas(client, "router-1", clock, timeout_s=30), Quotas(client, "router-2", clock, timeout_s=30)
        refused = [
            (await quotas.take("t", share, f"{number}", 0, 60)).verdict.refused
            for number, quotas in enumerate([first, second, first, second, first])
        ]
        assert refused == ["", "", "", "requests", "requests"]
        assert (await first.take("another", share, "r", 0, 60)).verdict.refused == ""


async def test_a_short_request_beside_a_long_one_does_not_end_the_long_ones_lease(redis_url) -> None:
    share, clock = Share(max_concurrent=2), Clock()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        quotas = Quotas(client, "router-1", clock, timeout_s=30)
        for lease_s in (600, 1):
            assert not (await quotas.take("t", share, f"of {lease_s} s", 0, lease_s)).verdict.refused
        assert await client.pttl("{tandem}:quota:t:running") > 500_000  # with the key all leases would go


class GoneRedis:
    """A Redis that was there, and is not any more; or that books what it is told, and loses or keeps its answer."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client, self.is_gone, self.is_mute, self.num_asked = client, False, False, 0
        self.hangs, self.has_booked = False, asyncio.Event()

    async def eval(self, *arguments: object) -> object:
        self.num_asked += 1
        if self.is_gone:
            raise redis.exceptions.ConnectionError("gone")
        answer = await self.client.eval(*arguments)
        if self.is_mute:
            raise redis.exceptions.TimeoutError("no answer")
        if self.hangs:
            self.has_booked.set()
            await asyncio.Event().wait()
        return answer


async def test_without_redis_each_router_keeps_its_part_and_asks_again_a_second_later(redis_url) -> None:
    share, clock = Share(requests_per_minute=8), Clock()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        gone = GoneRedis(client)
        first, second = Quotas(gone, "router-1", clock, timeout_s=30), Quotas(client, "router-2", clock, timeout_s=30)
        await second.take("t", share, "a", 0, 60)
        await first.take("t", share, "b", 0, 60)
        await first.take("of one router only", share, "c", 0, 60)
        gone.is_gone = True
        taken = [await first.take("t", share, str(number), 0, 60) for number in range(6)]
        assert [each.verdict.refused for each in taken] == [""] * 4 + ["requests"] * 2
        assert all(each.is_local and each.share.requests_per_minute == 4 for each in taken)
        assert (gone.num_asked, first.is_shared) == (3, False)
        await first.settle(taken[0], 0)
        gone.is_gone = False
        clock.now_s += 1.1
        assert first.is_shared
        assert not (await first.take("t", share, "z", 0, 60)).is_local


async def test_a_node_of_a_cluster_that_fails_is_forgotten_and_asked_for_again(redis_url) -> None:
    # Of a cluster that has moved our keys to where nobody is, and back.
    share = Share(requests_per_minute=8)
    async with open_home(redis_url, 30) as home:
        quotas = Quotas(home, "router-1", clock := Clock(), timeout_s=30)
        home._url = f"redis://127.0.0.1:{free_port()}/0"
        assert (await quotas.take("t", share, "a", 0, 60)).is_local
        clock.now_s += 1.1
        assert not (await quotas.take("t", share, "b", 0, 60)).is_local


async def test_what_ends_while_redis_is_away_holds_no_place_when_it_is_back(redis_url) -> None:
    share, clock = Share(tokens_per_minute=600, max_concurrent=2), Clock()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        gone = GoneRedis(client)
        quotas = Quotas(gone, "router-1", clock, timeout_s=30)
        one, two = [await quotas.take("t", share, name, 100, 600) for name in "ab"]
        gone.is_gone = True
        await quotas.settle(one, 60)  # it is asked, and gone
        await quotas.settle(two, 60)  # it is not even asked: that was a moment ago
        gone.is_gone = False
        clock.now_s += 1.1
        after = await quotas.take("t", share, "c", 100, 600)
        assert (after.is_local, after.verdict.refused, after.verdict.num_running) == (False, "", 1)
        assert after.verdict.tokens == pytest.approx(600 - 60 - 60 - 100, abs=20)  # it gains ten a second
        assert (await quotas.take("t", share, "d", 0, 600)).verdict.num_running == 2
        assert not quotas._ends


async def test_an_end_that_redis_had_heard_of_is_not_booked_twice(redis_url) -> None:
    share, clock = Share(tokens_per_minute=600, max_concurrent=2), Clock()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        mute = GoneRedis(client)
        quotas = Quotas(mute, "router-1", clock, timeout_s=30)
        taken = await quotas.take("t", share, "a", 500, 600)
        mute.is_mute = True
        await quotas.settle(taken, 400)
        mute.is_mute = False
        clock.now_s += 1.1
        after = await quotas.take("t", share, "b", 0, 600)
        assert (after.verdict.num_running, after.verdict.tokens) == (1, pytest.approx(200, abs=20))


@pytest.mark.parametrize("leaves", [False, True], ids=["no answer", "its client leaves"])
async def test_a_request_that_redis_booked_and_nobody_heard_of_holds_no_place(redis_url, leaves) -> None:
    share, clock = Share(tokens_per_minute=600, max_concurrent=1), Clock()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        mute = GoneRedis(client)
        quotas = Quotas(mute, "router-1", clock, timeout_s=30)
        mute.hangs, mute.is_mute = leaves, not leaves
        taking = asyncio.create_task(quotas.take("t", share, "a", 500, 600))
        if leaves:
            await mute.has_booked.wait()
            taking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await taking
        else:
            assert (await taking).is_local
        mute.hangs = mute.is_mute = False
        clock.now_s += 1.1
        after = await quotas.take("t", share, "b", 500, 600)
        assert (after.is_local, after.verdict.refused, after.verdict.num_running) == (False, "", 1)
