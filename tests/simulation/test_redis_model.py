"""The simulation's Redis answers as a real one does: each case runs on both."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import AuthenticationError, NoScriptError, ResponseError

from kvstore.index.entries import Tier, encode_keys, encode_snapshot
from kvstore.index.scripts import CLAIM, LOOKUP, SWEEP, WITHDRAW, WRITE, Script
from kvstore.registry import Membership, Registrar, new_incarnation, open_client
from services.router.sharing import Quotas, Share
from tests.prefix_index.index_world import BASE, INDEX, Holder, Recorder, World, block_hashes
from tests.simulation.redis_model.server import ModelRedis
from tests.waiting import until
from tests.worker_records import worker_record

NUM_RANDOM = 2000
ANSWER_S = 20.0
REFUSED = "ResponseError"


@pytest.fixture
async def model_url() -> AsyncIterator[str]:
    model = ModelRedis(time.time, seed=0, password="open sesame")
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    yield f"redis://:open%20sesame@127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    model.drop_clients()
    server.close()


@pytest.fixture(params=["model", "real"])
def url(request: pytest.FixtureRequest, model_url: str) -> str:
    return model_url if request.param == "model" else request.getfixturevalue("redis_url")


@pytest.fixture
async def client(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with open_client(url, ANSWER_S) as client:
        yield client


async def said(client: redis.asyncio.Redis, *words: object) -> object:
    """The bare reply; of an error its kind."""
    client.response_callbacks.clear()
    try:
        return await client.execute_command(*words)
    except ResponseError as error:
        return type(error).__name__


# ---- commands ----

COMMANDS: list[tuple[list[tuple[Any, ...]], list[object]]] = [
    ([("SET", "a", "x"), ("TYPE", "a"), ("STRLEN", "a"), ("GET", "none")], [b"OK", b"string", 1, None]),
    ([("SETRANGE", "a", 3, "xy"), ("GET", "a"), ("SETRANGE", "a", 1, "z"), ("GET", "a")],
     [5, b"\0\0\0xy", 5, b"\0z\0xy"]),
    ([("SETBIT", "a", 10, 1), ("BITPOS", "a", 1), ("SETBIT", "a", 10, 0), ("BITPOS", "a", 1)], [0, 10, 1, -1]),
    ([("BITPOS", "none", 1), ("STRLEN", "none"), ("TYPE", "none"), ("PTTL", "none")], [-1, 0, b"none", -2]),
    ([("HSET", "h", "a", 1, "b", 2), ("HSET", "h", "a", 3), ("HGETALL", "h")], [2, 0, [b"a", b"3", b"b", b"2"]]),
    ([("HSET", "h", "a", 1), ("HMGET", "h", "a", "z"), ("HDEL", "h", "a", "z"), ("EXISTS", "h")],
     [1, [b"1", None], 1, 0]),
    ([("HINCRBY", "h", "n", -3), ("HGET", "h", "n"), ("HLEN", "h"), ("HKEYS", "h")], [-3, b"-3", 1, [b"n"]]),
    ([("HSET", "h", "n", "x"), ("HINCRBY", "h", "n", 1), ("HEXISTS", "h", "n")], [1, REFUSED, 1]),
    ([("SADD", "s", "a", "b", "a"), ("SREM", "s", "a", "z"), ("SMEMBERS", "s"), ("TYPE", "s")], [2, 1, [b"b"], b"set"]),
    ([("SADD", "s", "a"), ("SRANDMEMBER", "s", 16), ("SRANDMEMBER", "none", 16)], [1, [b"a"], []]),
    ([("ZADD", "z", 2, "b", 1.5, "a", "3e12", "c"), ("ZSCORE", "z", "a"), ("ZSCORE", "z", "c")],
     [3, b"1.5", b"3000000000000"]),
    ([("ZADD", "z", 1, "b", 1, "a", 2, "c"), ("ZRANGEBYSCORE", "z", "-inf", 1)], [3, [b"a", b"b"]]),
    ([("ZADD", "z", 1, "a", 2, "c"), ("ZRANGEBYSCORE", "z", "(1", "+inf", "WITHSCORES")], [2, [b"c", b"2"]]),
    ([("ZADD", "z", 1, "a", 2, "b", 3, "c"), ("ZRANGEBYSCORE", "z", 1, 3, "LIMIT", 1, 1)], [3, [b"b"]]),
    ([("ZADD", "z", 1, "a", 2, "b"), ("ZREMRANGEBYSCORE", "z", "-inf", "(2"), ("ZCARD", "z")], [2, 1, 1]),
    ([("ZADD", "z", 1, "a"), ("ZADD", "z", 5, "a"), ("ZREM", "z", "a", "b"), ("EXISTS", "z")], [1, 0, 1, 0]),
    ([("SET", "a", "x"), ("HGET", "a", "b"), ("SADD", "a", "b"), ("ZADD", "a", 1, "b")], [b"OK", *[REFUSED] * 3]),
    ([("HSET", "h", "a", 1), ("GET", "h"), ("SETBIT", "h", 1, 1), ("DEL", "h", "none")], [1, REFUSED, REFUSED, 1]),
    ([("ZADD", "z", "many", "a"), ("EXISTS", "z"), ("PEXPIRE", "z", 100), ("EXPIRE", "z", "a")],
     [REFUSED, 0, 0, REFUSED]),
    ([("HSET", "h", "a"), ("GET",), ("NONSENSE", 1)], [REFUSED] * 3),
    ([("SET", "a", "x", "PX", 60000), ("SET", "a", "y"), ("PTTL", "a")], [b"OK", b"OK", -1]),
    ([("SET", "a", "x"), ("PEXPIRE", "a", 0), ("GET", "a"), ("PTTL", "a")], [b"OK", 1, None, -2]),
    ([("SET", "a", "x"), ("HSET", "h", "a", 1), ("FLUSHALL",), ("EXISTS", "a", "h")], [b"OK", 1, b"OK", 0]),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "answers"), COMMANDS)
async def test_a_command_answers(client: redis.asyncio.Redis, asked: list[tuple[Any, ...]], answers: list[object]):
    assert [await said(client, *words) for words in asked] == answers


async def test_what_has_expired_is_gone(client: redis.asyncio.Redis):
    assert await said(client, "SET", "a", "x", "PX", 40) == b"OK"
    assert await said(client, "HSET", "h", "a", 1) == 1
    assert await said(client, "PEXPIRE", "h", 60_000) == 1
    left_ms = await said(client, "PTTL", "h")
    assert isinstance(left_ms, int)
    assert 0 < left_ms <= 60_000
    async with asyncio.timeout(ANSWER_S):
        while await said(client, "EXISTS", "a"):  # noqa: ASYNC110 -- a key ends without telling anybody
            await asyncio.sleep(0.01)
    assert await said(client, "GET", "a") is None


async def test_random_commands_are_answered_alike(model_url: str, redis_url: str):
    draw, keys = random.Random(1), "abc"
    members = ["", "m", "n", "\xff", "17", "2"]

    def words() -> tuple[object, ...]:
        key, member = draw.choice(keys), draw.choice(members)
        number, score = draw.randrange(40), draw.choice([-1, 0, 1.25, 3, 1e15, "(1", "x"])
        return draw.choice(
            [
                *(("DEL", key), ("TYPE", key), ("EXISTS", key), ("PEXPIRE", key, 600_000), ("GET", key)),
                *(("SET", key, member), ("STRLEN", key), ("SETRANGE", key, number, member), ("BITPOS", key, 1)),
                *(("SETBIT", key, number, number % 2), ("HGET", key, member), ("HSET", key, member, number)),
                *(
                    ("HDEL", key, member, "m"),
                    ("HLEN", key),
                    ("HEXISTS", key, member),
                    ("HINCRBY", key, member, number),
                ),
                *(
                    ("SADD", key, member, "m"),
                    ("SREM", key, member),
                    ("ZADD", key, score, member),
                    ("ZREM", key, member),
                ),
                *(("ZCARD", key), ("ZSCORE", key, member), ("ZRANGEBYSCORE", key, score, "+inf", "WITHSCORES")),
                *(("ZREMRANGEBYSCORE", key, score, number), ("ZRANGEBYSCORE", key, "-inf", number, "LIMIT", 1, 2)),
            ]
        )

    async with open_client(model_url, ANSWER_S) as model, open_client(redis_url, ANSWER_S) as real:
        for _ in range(NUM_RANDOM):
            asked = words()
            assert (asked, await said(model, *asked)) == (asked, await said(real, *asked))


# ---- scripts ----

SCRIPTS = {
    "return 3.9": 3,
    "return -3.9": -3,
    "return {1, 'a', {2}, false, nil, 5}": [1, b"a", [2], None],
    "return {ok = 'fine'}": b"fine",
    "return {err = 'WRONG it is'}": REFUSED,
    "return false": None,
    "return true": 1,
    "return redis.call('TYPE', KEYS[1]).ok": b"none",
    "return redis.call('GET', KEYS[1]) == false": 1,
    "return redis.pcall('HGET', KEYS[1]).err ~= nil": 1,
    "redis.call('SET', KEYS[1], 1) return redis.call('HGET', KEYS[1], 'a')": REFUSED,
    "redis.call('SET', KEYS[1], 1e15 + 0.5) return redis.call('GET', KEYS[1])": b"1000000000000000.5",
    "return string.format('(%.0f', redis.call('TIME')[1] * 0 + 123)": b"(123",
    "return tostring(bit.bor(bit.lshift(5, 4), bit.band(255, bit.bnot(240))))": b"95",
    "local ok, found = pcall(cjson.decode, '{\"a\": [1, null], \"b\": \"x\"}') return {found.b, found.a[1]}": [b"x", 1],
    "return pcall(cjson.decode, 'no json')": None,
    "return #redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '+inf')": 0,
    "return ARGV[1]": b"\0\xff",
    "return forgotten": REFUSED,
    "forgotten = 1": REFUSED,
    "return (": REFUSED,
}  # fmt: skip


@pytest.mark.parametrize("text", SCRIPTS)
async def test_a_script_answers(client: redis.asyncio.Redis, text: str):
    assert await said(client, "EVAL", text, 1, "key", b"\0\xff") == SCRIPTS[text]


async def test_a_script_is_known_by_its_digest_until_the_end_even_after_a_flush(client: redis.asyncio.Redis):
    script = Script("return KEYS[1]")
    with pytest.raises(NoScriptError):
        await client.execute_command("EVALSHA", script.sha, 1, "a")
    assert await said(client, "SCRIPT", "LOAD", script.text) in (script.sha, script.sha.encode())
    await client.flushall()
    assert await said(client, "EVALSHA", script.sha, 1, "a") == b"a"


async def test_the_indexs_scripts_answer(client: redis.asyncio.Redis):
    hashes = block_hashes(40)

    async def run(script: Script, *arguments: str | bytes | int) -> Any:
        return await said(client, "EVAL", script.text, 1, INDEX, BASE, *arguments)

    assert await run(CLAIM, "w", "i", "token", 1) == [0, b""]  # nobody is registered
    await client.hset("{tandem}:workers", "w", '{"incarnation": "i"}')
    await client.zadd("{tandem}:leases", {"w": 4e12})
    assert await run(CLAIM, "w", "j", "token", 1) == [0, b"i"]
    assert await run(CLAIM, "w", "i", "token", 1) == [1]
    record = "token.1 i w"
    changes = encode_snapshot([(each, Tier.DEVICE) for each in hashes] + [(hashes[0], Tier.HOST)])
    assert [await run(WRITE, 1, record, seq, changes) for seq in (2, 1, 1, 0)] == [0, 1, 1, 0]
    assert await run(WRITE, 1, "another", 2, changes) == 0
    version, table, *runs = await run(LOOKUP, encode_keys(hashes[:3]), "")
    assert (table, runs) == ([b"1", record.encode()], [1, b"\0\x13", 2, b"\0\x11"])
    assert (await run(LOOKUP, encode_keys(hashes[:1]), version))[1:] == [None, 1, b"\0\x13"]
    assert await run(LOOKUP, encode_keys(block_hashes(1, "other")), version) == [version, None]
    assert [await run(WITHDRAW, 1, record) for _ in range(2)] == [1, 0]
    assert await run(LOOKUP, encode_keys(hashes[:1]), "") != [b"", []]
    while await run(SWEEP, "sweeper", 1000, 64, 1024):
        pass
    assert await said(client, "HGETALL", f"{INDEX}:slots") == []
    assert [await said(client, "SMEMBERS", f"{INDEX}:dead"), await said(client, "HGET", INDEX, "n")] == [[], b"0"]


# ---- the product's clients ----


async def test_who_announces_itself_is_seen_and_who_leaves_or_dies_is_not(url: str):
    records = [worker_record(worker_id=f"w{number}", incarnation=new_incarnation()) for number in range(3)]
    registrars = [Registrar(url, record, lease_s=0.6, timeout_s=ANSWER_S) for record in records]
    membership = Membership(url, grace_s=0.6, poll_s=0.2, timeout_s=ANSWER_S)

    def seen() -> set[str]:
        return {record.worker_id for record in membership.snapshot()}

    await membership.start()
    for registrar in registrars:
        await registrar.start()
    await until(lambda: seen() == {"w0", "w1", "w2"})
    await registrars[0].close()
    await until(lambda: seen() == {"w1", "w2"})
    assert registrars[1]._task is not None
    registrars[1]._task.cancel()  # as a kill: nothing is withdrawn
    await until(lambda: seen() == {"w2"})
    younger = Registrar(url, worker_record(worker_id="w2", incarnation=new_incarnation()), timeout_s=ANSWER_S)
    await younger.start()
    await until(lambda: registrars[2].superseded_by == younger.record.incarnation)
    for session in (younger, registrars[2], membership):
        await session.close()


async def test_lookups_find_what_is_held_before_and_after_a_flush(url: str):
    world, hashes = World(url), block_hashes(50)
    first, second = await world.hold("w0", num_blocks=50), await world.hold("w1", num_blocks=10)
    recorder = Recorder()
    reader = await world.read(recorder)
    await world.finds(reader, hashes, [first, second])
    first.remove(hashes[20:30])
    await world.finds(reader, hashes, [first, second])
    await world.leave(second)
    await world.finds(reader, hashes, [first])
    async with open_client(url, ANSWER_S) as client:
        await client.flushall()
    await world.finds(reader, hashes, [first])
    await world.kill(first)
    successor = Holder(url, "w0")
    await world.start(successor)
    await world.finds(reader, hashes, [successor])
    await world.close()


async def test_limits_are_kept_for_all_routers_together(url: str):
    share = Share(requests_per_minute=3, tokens_per_minute=100, max_concurrent=2)
    async with open_client(url, ANSWER_S) as client:
        one, other = (Quotas(client, name, time.monotonic, timeout_s=ANSWER_S) for name in "ab")
        taken = [
            await quotas.take("t", share, name, num_tokens, 60)
            for quotas, name, num_tokens in ((one, "1", 40), (other, "2", 40), (one, "3", 40))
        ]
        assert [each.verdict.refused for each in taken] == ["", "", "concurrent"]
        await other.settle(taken[1], 10)
        assert (await one.take("t", share, "4", 60, 60)).verdict.refused == "tokens"
        assert (await one.take("t", share, "5", 40, 60)).verdict.refused == ""
        assert (one._num_routers, any(each.is_local for each in taken)) == (2, False)


async def test_who_does_not_know_the_password_is_told_nothing(url: str):
    host = url.partition("@")[2]
    for wrong in (f"redis://{host}", f"redis://:wrong@{host}"):
        async with open_client(wrong, ANSWER_S) as client:
            with pytest.raises(AuthenticationError):
                await client.execute_command("GET", "a")
