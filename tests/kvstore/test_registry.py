"""The registry over a real Redis: joining, dying, leaving, conflicts, garbage, and Redis itself away and back again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import msgspec
import pytest
import redis
import redis.asyncio

from kvstore.errors import RegistryError
from kvstore.registry import (
    ConnectionState,
    Membership,
    Registrar,
    WorkerRecord,
    new_incarnation,
    next_incarnation,
)
from services.cli.embedded_redis import EmbeddedRedis
from tests.waiting import until
from tests.worker_records import worker_record

WAIT_S = 60.0  # an upper bound for waits on events, far above what any of them takes
LEASE_S = 1.5  # of which a third may pass until it is renewed, and the rest on a machine that is busy


def make_record(worker_id: str = "prefill-0", **fields: object) -> WorkerRecord:
    return worker_record(worker_id=worker_id, incarnation=new_incarnation(), **fields)


class Cluster:
    """Registrars and memberships that are all closed at the end of a test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.open: list[Registrar | Membership] = []

    async def join(self, record: WorkerRecord, lease_s: float = LEASE_S) -> Registrar:
        registrar = Registrar(self.url, record, lease_s, timeout_s=2.0)
        self.open.append(registrar)
        await registrar.start()
        await until(lambda: registrar.connected, WAIT_S)
        return registrar

    async def follow(self, grace_s: float = LEASE_S, poll_s: float = 30.0) -> Membership:
        """By default with a poll interval that no test outlives, so that what arrives in time came by the channel."""
        membership = Membership(self.url, grace_s=grace_s, poll_s=poll_s, timeout_s=2.0)
        self.open.append(membership)
        await membership.start()
        await until(lambda: membership.connected, WAIT_S)
        return membership

    async def kill(self, registrar: Registrar) -> None:
        """What SIGKILL does to a worker: it renews nothing any more and withdraws nothing."""
        assert registrar._task is not None
        registrar._task.cancel()
        await asyncio.wait([registrar._task])
        self.open.remove(registrar)


async def wait_for_redis(url: str, count: Callable[[redis.asyncio.Redis], Awaitable[int]], expected: int) -> None:
    async with redis.asyncio.Redis.from_url(url) as client, asyncio.timeout(WAIT_S):
        while await count(client) != expected:  # noqa: ASYNC110 -- Redis has no event for it
            await asyncio.sleep(0.02)


def ids(membership: Membership) -> list[str]:
    return [record.worker_id for record in membership.snapshot()]


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[Cluster]:
    cluster = Cluster(redis_url)
    yield cluster
    for member in reversed(cluster.open):
        await member.close()


@pytest.fixture
def own_server() -> Iterator[EmbeddedRedis]:
    """A server that the test may stop, hang or kill."""
    with EmbeddedRedis.start() as server:
        yield server


@pytest.fixture
async def own_cluster(own_server: EmbeddedRedis) -> AsyncIterator[Cluster]:
    cluster = Cluster(own_server.url)
    yield cluster
    for member in reversed(cluster.open):
        await member.close()


async def test_a_worker_that_joins_is_seen_with_its_whole_record(cluster):
    membership = await cluster.follow()
    seen: list[tuple[WorkerRecord, ...]] = []
    membership.on_change(seen.append)
    record = make_record(role="decode", served_model_names=("demo", "ä"), transports=("nixl", "ucxx"))
    await cluster.join(record)
    await until(lambda: bool(membership.snapshot()), WAIT_S)
    assert membership.snapshot() == (record,)
    assert seen == [(record,)]


async def test_a_worker_that_starts_is_not_among_those_that_serve(cluster):
    membership = await cluster.follow()
    seen: list[tuple[WorkerRecord, ...]] = []
    membership.on_change(seen.append)
    record = make_record()
    starting = msgspec.structs.replace(record, phase="loading", model_fingerprint="", num_blocks=0)
    registrar = await cluster.join(starting)
    await until(lambda: membership.starting() == (starting,), WAIT_S)
    registrar.update(record)
    await until(lambda: membership.snapshot() == (record,), WAIT_S)
    assert membership.starting() == ()
    assert seen == [(), (record,)]


async def test_a_process_that_may_never_serve_takes_no_id_from_one_that_does(cluster):
    membership = await cluster.follow()
    serving = await cluster.join(make_record())
    twin = make_record(phase="loading")
    late = await cluster.join(twin)
    await until(lambda: bool(membership.snapshot()), WAIT_S)
    assert (membership.snapshot(), membership.starting()) == ((serving.record,), ())
    late.update(msgspec.structs.replace(twin, phase=""))
    await until(lambda: membership.snapshot()[0].incarnation == twin.incarnation, WAIT_S)


async def test_a_router_that_starts_later_sees_those_who_are_there(cluster):
    await cluster.join(make_record("decode-1"))
    await cluster.join(make_record("decode-0"))
    membership = await cluster.follow()
    assert ids(membership) == ["decode-0", "decode-1"]


async def test_a_worker_that_withdraws_is_gone_at_once_and_leaves_nothing_in_redis(cluster):
    registrar = await cluster.join(make_record(), lease_s=60)
    membership = await cluster.follow()
    assert ids(membership) == ["prefill-0"]
    await registrar.close()
    await until(lambda: not membership.snapshot(), WAIT_S)
    assert registrar.connection_state is ConnectionState.CLOSED
    async with redis.asyncio.Redis.from_url(cluster.url) as client:
        assert await client.keys("*") == [b"{tandem}:departed"]  # for the prefix index


async def test_a_renewed_lease_outlives_its_first_term_and_changes_nothing(cluster):
    await cluster.join(make_record())
    membership = await cluster.follow(poll_s=0.05)
    changes: list[object] = []
    membership.on_change(changes.append)
    await asyncio.sleep(2 * LEASE_S)
    assert ids(membership) == ["prefill-0"]
    assert changes == []


async def test_a_killed_worker_is_gone_when_its_lease_ends_and_the_others_stay(cluster):
    killed = await cluster.join(make_record("prefill-0"))
    await cluster.join(make_record("prefill-1"))
    membership = await cluster.follow()
    await cluster.kill(killed)
    assert ids(membership) == ["prefill-0", "prefill-1"]
    await until(lambda: ids(membership) == ["prefill-1"], WAIT_S)


async def test_the_last_worker_killed_leaves_nothing_in_redis(cluster):
    await cluster.kill(await cluster.join(make_record(), lease_s=0.1))
    await wait_for_redis(cluster.url, lambda client: client.dbsize(), 0)


@pytest.mark.parametrize("error", [KeyError("a bug of ours"), asyncio.CancelledError()])
async def test_a_registrar_survives_an_error_that_is_not_redis(cluster, monkeypatch, caplog, error):
    membership = await cluster.follow()
    registrar = await cluster.join(make_record("prefill-0"))
    announce, failures = registrar._announce, iter([error, error])

    async def announce_in_the_end(client: redis.asyncio.Redis) -> None:
        for failure in failures:
            raise failure
        await announce(client)

    monkeypatch.setattr(registrar, "_announce", announce_in_the_end)
    await until(lambda: not registrar.connected, WAIT_S)
    await until(lambda: registrar.connected, WAIT_S)
    registrar.update(msgspec.structs.replace(registrar.record, draining=True))
    await until(lambda: [each.draining for each in membership.snapshot()] == [True], WAIT_S)
    assert sum(f"trying again: {type(error).__name__}" in record.message for record in caplog.records) == 1


async def test_an_update_is_seen_at_once(cluster):
    registrar = await cluster.join(make_record(), lease_s=60)
    membership = await cluster.follow()
    registrar.update(msgspec.structs.replace(registrar.record, draining=True, num_blocks=256))
    await until(lambda: membership.snapshot()[0].draining, WAIT_S)
    assert membership.snapshot() == (registrar.record,)


async def test_an_update_must_not_change_who_the_worker_is(cluster):
    registrar = await cluster.join(make_record())
    with pytest.raises(RegistryError, match="must keep its worker id and incarnation"):
        registrar.update(make_record("another"))


async def test_of_two_workers_with_one_id_the_newer_wins_and_the_older_says_so(cluster, caplog):
    older, newer = make_record(num_blocks=1), make_record(num_blocks=2)
    first = await cluster.join(older)
    membership = await cluster.follow()
    second = await cluster.join(newer)
    with caplog.at_level(logging.ERROR):
        await until(lambda: first.superseded_by == newer.incarnation, WAIT_S)
    await until(lambda: membership.snapshot() == (newer,), WAIT_S)
    assert second.superseded_by is None
    errors = [line.getMessage() for line in caplog.records if line.levelno == logging.ERROR]
    assert len(errors) == 1
    assert newer.incarnation in errors[0]
    assert older.incarnation in errors[0]

    await cluster.kill(second)  # and now the older one is the only one
    await until(lambda: first.superseded_by is None, WAIT_S)
    await until(lambda: membership.snapshot() == (older,), WAIT_S)


async def test_a_superseded_worker_that_leaves_does_not_withdraw_its_successor(cluster):
    older, newer = make_record(), make_record()
    first = await cluster.join(older)
    await cluster.join(newer)
    membership = await cluster.follow()
    await first.close()
    async with redis.asyncio.Redis.from_url(cluster.url) as client:
        await client.publish("{tandem}:changes", f"withdrawn {older.worker_id} {older.incarnation}")
    await cluster.join(make_record("prefill-1"))
    await until(lambda: len(membership.snapshot()) == 2, WAIT_S)
    assert membership.snapshot()[0] == newer


async def test_a_restarted_worker_takes_its_id_over_at_once_even_if_the_clock_was_set_back(cluster, monkeypatch):
    before = make_record()
    await cluster.kill(await cluster.join(before, lease_s=60))
    membership = await cluster.follow()
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    incarnation = await next_incarnation(cluster.url, before.worker_id)
    restarted = msgspec.structs.replace(before, incarnation=incarnation)
    await cluster.join(restarted)
    await until(lambda: membership.snapshot() == (restarted,), WAIT_S)


async def test_with_redis_away_or_a_record_of_garbage_an_incarnation_follows_from_the_clock(cluster):
    async with redis.asyncio.Redis.from_url(cluster.url) as client:
        await client.hset("{tandem}:workers", "prefill-0", "garbage")
    for url, worker_id in ((cluster.url, "prefill-0"), (cluster.url, "unknown"), ("redis://127.0.0.1:1", "any")):
        before = new_incarnation()
        assert before < await next_incarnation(url, worker_id) < new_incarnation()


async def test_a_restarted_worker_takes_its_id_over_at_once(cluster):
    await cluster.kill(await cluster.join(make_record(), lease_s=60))
    membership = await cluster.follow()
    restarted = make_record(grpc_address="127.0.0.1:6001")
    await cluster.join(restarted)
    await until(lambda: membership.snapshot() == (restarted,), WAIT_S)


async def test_garbage_in_redis_and_on_the_channel_is_reported_once_and_ignored(cluster, caplog):
    membership = await cluster.follow(poll_s=0.02)
    garbage = [b"", b"{}", b"\xff\xfe", b"[1]", b'{"worker_id": "g4", "incarnation": "~"}', b"null"]
    async with redis.asyncio.Redis.from_url(cluster.url) as client:
        for index, data in enumerate(garbage):
            await client.hset("{tandem}:workers", f"g{index}", data)
            await client.zadd("{tandem}:leases", {f"g{index}": "inf" if index % 2 else 9e15})
        await client.zadd("{tandem}:leases", {"without record": 9e15, b"\xff": 9e15})
        await client.hset("{tandem}:workers", "prefill-0", b'{"incarnation": "~~~"}')  # no lease: bars nobody
        for message in (b"", b"\xff", b"withdrawn", b"withdrawn  ", b"a b c d", b"x" * 10000):
            await client.publish("{tandem}:changes", message)
        await cluster.join(make_record())
        await until(lambda: ids(membership) == ["prefill-0"], WAIT_S)
        await client.publish("{tandem}:changes", "again")
        await cluster.join(make_record("prefill-1"))
        await until(lambda: len(ids(membership)) == 2, WAIT_S)
    assert membership.connected
    warnings = [line.getMessage() for line in caplog.records if "ignoring" in line.getMessage()]
    assert len(warnings) == len(set(warnings)) == len(garbage) + 2


@pytest.mark.parametrize("key", ["workers", "leases", "departed"])
async def test_a_key_that_is_not_ours_does_not_keep_workers_out_for_good(cluster, key):
    async with redis.asyncio.Redis.from_url(cluster.url) as client:
        await client.set(f"{{tandem}}:{key}", "rubbish")
    registrar = await cluster.join(make_record("decode-0"))
    membership = await cluster.follow()
    await until(lambda: ids(membership) == ["decode-0"], WAIT_S)
    await registrar.close()
    await until(lambda: ids(membership) == [], WAIT_S)


async def test_deployments_with_different_prefixes_do_not_see_each_other(cluster):
    await cluster.join(make_record())
    other = Membership(cluster.url, prefix="staging")
    cluster.open.append(other)
    await other.start()
    await until(lambda: other.connected, WAIT_S)
    assert other.snapshot() == ()


async def test_a_flushed_redis_is_full_again_before_any_router_misses_a_worker(cluster):
    await cluster.join(make_record("prefill-0"))
    await cluster.join(make_record("prefill-1"))
    membership = await cluster.follow(poll_s=0.02)
    changes: list[object] = []
    membership.on_change(changes.append)
    async with redis.asyncio.Redis.from_url(cluster.url) as client:
        await client.flushall()
    await wait_for_redis(cluster.url, lambda client: client.hlen("{tandem}:workers"), 2)
    assert ids(membership) == ["prefill-0", "prefill-1"]
    assert changes == []


async def test_redis_killed_and_restarted_changes_no_membership(own_server, own_cluster, caplog):
    registrar = await own_cluster.join(make_record())
    membership = await own_cluster.follow(grace_s=10, poll_s=0.2)
    changes: list[object] = []
    membership.on_change(changes.append)
    os.kill(own_server.pid, signal.SIGKILL)
    await until(lambda: membership.connection_state is ConnectionState.DISCONNECTED, WAIT_S)
    await until(lambda: registrar.connection_state is ConnectionState.DISCONNECTED, WAIT_S)
    await asyncio.sleep(1.5 * LEASE_S)  # longer than the lease: it says nothing while nobody can renew it
    assert ids(membership) == ["prefill-0"]

    with own_server.start_again():
        await until(lambda: membership.connected, WAIT_S)
        await until(lambda: registrar.connected, WAIT_S)
        latecomer = await own_cluster.join(make_record("prefill-1"))
        await until(lambda: ids(membership) == ["prefill-0", "prefill-1"], WAIT_S)
        await registrar.close()
        await until(lambda: ids(membership) == ["prefill-1"], WAIT_S)
        await latecomer.close()
    failures = [line for line in caplog.records if "failed, trying again" in line.getMessage()]
    assert 2 <= len(failures) <= 4  # once per outage and session, however often they tried (ours ended in a second one)
    assert [len(change) for change in changes] == [2, 1] or [len(change) for change in changes] == [2, 1, 0]


async def test_a_worker_that_died_while_redis_was_away_is_dropped_after_the_grace_period(own_server, own_cluster):
    dead = await own_cluster.join(make_record("prefill-0"))
    await own_cluster.join(make_record("prefill-1"))
    membership = await own_cluster.follow(grace_s=2 * LEASE_S, poll_s=0.1)
    os.kill(own_server.pid, signal.SIGKILL)
    await until(lambda: not membership.connected, WAIT_S)
    await own_cluster.kill(dead)
    with own_server.start_again():
        await until(lambda: membership.connected, WAIT_S)
        assert ids(membership) == ["prefill-0", "prefill-1"]
        await until(lambda: ids(membership) == ["prefill-1"], WAIT_S)


async def test_a_hung_redis_is_noticed_by_deadline_and_heals(own_server, own_cluster):
    registrar = await own_cluster.join(make_record())
    membership = await own_cluster.follow(grace_s=10, poll_s=0.1)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        await until(lambda: not membership.connected, WAIT_S)
        await until(lambda: not registrar.connected, WAIT_S)
        assert ids(membership) == ["prefill-0"]
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    await until(lambda: membership.connected, WAIT_S)
    await until(lambda: registrar.connected, WAIT_S)
    assert ids(membership) == ["prefill-0"]


async def test_workers_and_routers_start_before_redis_does(own_server, own_cluster):
    own_server.close()
    registrar = Registrar(own_server.url, make_record(), LEASE_S)
    membership = Membership(own_server.url, poll_s=0.2)
    own_cluster.open += [registrar, membership]
    await registrar.start()
    await membership.start()
    await until(lambda: registrar.connection_state is ConnectionState.DISCONNECTED, WAIT_S)
    assert membership.snapshot() == ()
    with own_server.start_again():
        await until(lambda: ids(membership) == ["prefill-0"], WAIT_S)
        await registrar.close()


async def test_closing_without_redis_is_quick_and_raises_nothing(own_server, own_cluster, caplog):
    registrar = await own_cluster.join(make_record())
    own_server.close()
    async with asyncio.timeout(WAIT_S):
        await registrar.close()
        await registrar.close()
    assert "could not withdraw" in caplog.text


async def test_closing_ends_the_task_even_while_it_is_talking_to_redis(cluster):
    membership = await cluster.follow()
    for _ in range(20):
        registrar = await cluster.join(make_record())
        await registrar.close()  # its goodbye makes the membership read, just when it is closed
        async with asyncio.timeout(WAIT_S):
            await membership.close()
        membership = await cluster.follow()


async def test_a_failing_callback_stops_neither_the_others_nor_the_membership(cluster, caplog):
    membership = await cluster.follow()
    seen: list[int] = []
    membership.on_change(lambda records: 1 / 0)
    membership.on_change(lambda records: seen.append(len(records)))
    await cluster.join(make_record("prefill-0"))
    await until(lambda: seen == [1], WAIT_S)
    await cluster.join(make_record("prefill-1"))
    await until(lambda: seen == [1, 2], WAIT_S)
    assert "a callback failed" in caplog.text


async def test_many_workers_that_start_together_are_all_seen(cluster):
    membership = await cluster.follow()
    await asyncio.gather(*[cluster.join(make_record(f"w{i:02}"), lease_s=5) for i in range(30)])
    await until(lambda: len(membership.snapshot()) == 30, WAIT_S)
    assert ids(membership) == [f"w{i:02}" for i in range(30)]


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://host:port", "redis://[::1"])
async def test_a_malformed_url_is_refused_at_once(url):
    with pytest.raises(RegistryError, match="malformed Redis URL"):
        Membership(url)


async def test_a_password_never_reaches_a_message(caplog):
    with pytest.raises(RegistryError) as refused:
        Membership("redis://me:hunter2@host:port")
    membership = Membership("redis://me:hunter2@127.0.0.1:1/0")
    await membership.start()
    await until(lambda: membership.connection_state is ConnectionState.DISCONNECTED, WAIT_S)
    await membership.close()
    assert "127.0.0.1:1" in caplog.text
    assert "hunter2" not in caplog.text + str(refused.value)


async def test_impossible_settings_are_refused():
    with pytest.raises(RegistryError, match="a lease must last"):
        Registrar("redis://h", make_record(), 0.0)
    with pytest.raises(RegistryError, match="poll interval must be positive"):
        Membership("redis://h", poll_s=0)
    with pytest.raises(RegistryError, match="prefix"):
        Membership("redis://h", prefix="a{b}")
    with pytest.raises(RegistryError, match="must be positive"):
        Membership("redis://h", timeout_s=0)
