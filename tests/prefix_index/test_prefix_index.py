"""The prefix index over a real Redis: reporting, asking, dying, coming back, and what it leaves behind."""

from __future__ import annotations

import asyncio

import pytest
import redis.asyncio

from kvstore.errors import RegistryError
from kvstore.index import (
    IndexReader,
    IndexWriter,
    ResyncReason,
    Tier,
)
from kvstore.index.entries import Holding
from kvstore.index.session import LookupOutcome
from kvstore.registry.redis_session import redirect
from tests.prefix_index.index_world import (
    BASE,
    INDEX,
    LEASE_S,
    LEASES,
    LOOKUP_S,
    WAIT_S,
    Holder,
    Recorder,
    block_hashes,
    check_integrity,
    errors,
    eventually,
    registrar,
    sweep,
)
from tests.waiting import until

HASHES = block_hashes(40)


async def test_a_lookup_tells_each_holders_prefix_by_best_tier(world, client):
    near, far = await world.hold("near"), await world.hold("far")
    near.add(HASHES[:10])
    near.add(HASHES[5:20], Tier.HOST)
    far.add(HASHES[:30], Tier.STORE)
    far.add(HASHES[30:40], Tier.DISK)
    await near.synced()
    await far.synced()
    reader = await world.read()
    assert await reader.lookup(HASHES, LOOKUP_S) == [
        Holding("far", far.incarnation, 40, (0, 0, 30, 10)),
        Holding("near", near.incarnation, 20, (10, 10, 0, 0)),
    ]
    assert await reader.lookup(HASHES[5:12], LOOKUP_S) == [
        Holding("near", near.incarnation, 7, (5, 2, 0, 0)),
        Holding("far", far.incarnation, 7, (0, 0, 7, 0)),
    ]
    check_integrity(client)


async def test_a_gap_ends_a_prefix_and_blocks_after_it_are_found_by_asking_for_them(world):
    holder = await world.hold()
    holder.add(HASHES[:8])
    holder.remove(HASHES[3:4])
    await holder.synced()
    reader = await world.read()
    assert [held.num_blocks for held in await reader.lookup(HASHES[:8], LOOKUP_S)] == [3]
    assert await reader.lookup(HASHES[3:8], LOOKUP_S) == []
    assert [held.num_blocks for held in await reader.lookup(HASHES[4:8], LOOKUP_S)] == [4]
    assert await reader.lookup([], LOOKUP_S) == []


async def test_a_block_leaves_the_index_with_its_last_tier_and_leaves_no_key(world, client):
    holder = await world.hold(num_blocks=20)
    holder.add(HASHES[:20], Tier.HOST)
    reader = await world.read()
    holder.remove(HASHES[:20])
    await holder.synced()
    await world.finds(reader, HASHES[:20], [holder])
    holder.remove(HASHES[:20], Tier.HOST)
    await holder.synced()
    assert await reader.lookup(HASHES[:20], LOOKUP_S) == []
    assert client.keys(BASE + b"*") == []
    check_integrity(client)


async def test_a_lookup_is_one_round_trip_and_one_script(world, client):
    await world.hold(num_blocks=40, lease_s=60.0)
    reader = await world.read(probe_s=WAIT_S)
    await reader.lookup(HASHES, LOOKUP_S)  # from here on Redis has the script
    await asyncio.sleep(0)
    client.config_resetstat()
    for _ in range(5):
        assert await reader.lookup(HASHES, LOOKUP_S)
    calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert calls["cmdstat_evalsha"] == 5
    assert not calls.keys() & {"cmdstat_eval", "cmdstat_script", "cmdstat_ping"}


async def test_lookups_at_the_same_time_each_get_their_own_answer(world):
    holder = await world.hold(num_blocks=40)
    reader = await world.read()
    wanted = [HASHES[start : start + 1 + start % 3] for start in range(37)] * 3
    found = await asyncio.gather(*(reader.lookup(hashes, LOOKUP_S) for hashes in wanted))
    assert found == [[holder.holding(hashes)] for hashes in wanted]


async def test_a_lookup_that_is_cancelled_harms_no_other(world):
    holder = await world.hold(num_blocks=40)
    reader = await world.read()
    lookups = [asyncio.create_task(reader.lookup(HASHES, LOOKUP_S)) for _ in range(20)]
    await asyncio.sleep(0)
    for lookup in lookups[::2]:
        lookup.cancel()
    await asyncio.wait(lookups)
    assert all(lookup.cancelled() for lookup in lookups[::2])
    assert [lookup.result() for lookup in lookups[1::2]] == [[holder.holding(HASHES)]] * 10


async def test_a_lookup_that_misses_its_deadline_says_so_and_the_next_ones_are_answered(world):
    holder = await world.hold(num_blocks=40)
    recorder = Recorder()
    reader = await world.read(recorder)
    assert await reader.lookup(HASHES, timeout_s=0.0) == []
    assert recorder.outcomes == [LookupOutcome.TIMED_OUT]
    assert not reader.available
    assert await reader.lookup(HASHES) == []
    assert recorder.outcomes[-1] is LookupOutcome.SKIPPED
    await until(lambda: reader.connected, WAIT_S)
    await world.finds(reader, HASHES, [holder])


async def test_a_holder_that_closes_is_invisible_at_once(world, client):
    stays, leaves = await world.hold("stays", 10), await world.hold("leaves", 20)
    reader = await world.read()
    await world.finds(reader, HASHES, [stays, leaves])
    await world.leave(leaves)
    assert await reader.lookup(HASHES, LOOKUP_S) == [stays.holding(HASHES)]
    sweep(client)
    check_integrity(client)


async def test_a_killed_holder_is_invisible_when_its_lease_ends_and_its_entries_go_without_a_scan(world, client):
    stays, dies = await world.hold("stays", 10), await world.hold("dies", 40)
    reader = await world.read()
    await world.finds(reader, HASHES, [stays, dies])
    client.config_resetstat()
    await world.kill(dies)
    await world.finds(reader, HASHES, [stays])

    async def is_swept() -> bool:
        async with redis.asyncio.Redis.from_url(world.url) as watcher:
            return await watcher.scard(f"{INDEX}:dead") == 0 and await watcher.hlen(f"{INDEX}:slots") == 1

    await eventually(is_swept)
    used = set(client.info("commandstats"))
    assert not {name for name in used if "scan" in name or name == "cmdstat_keys"}
    assert int(client.hget(INDEX, "n")) == 10
    check_integrity(client)


async def test_many_dead_are_swept_together_in_small_steps_and_their_slots_are_used_again(world, client):
    stays = await world.hold("stays", 40, lease_s=60.0)
    dying = [await world.hold(f"dies-{i}", 40, lease_s=60.0) for i in range(40)]
    assert client.hlen(f"{INDEX}:slots") == 41
    for holder in dying:
        await world.kill(holder)
        client.zadd(LEASES, {holder.holder_id: 0})
    reader = await world.read()
    await world.finds(reader, HASHES, [stays])
    sweep(client)
    check_integrity(client)
    assert client.keys(f"{INDEX}:held:*") == [f"{INDEX}:held:1".encode()]
    again = await world.hold("again", 5)
    assert client.hget(f"{INDEX}:ids", "again") == b"2"
    await world.finds(reader, HASHES, [stays, again])


async def test_a_restarted_holder_has_only_what_its_new_incarnation_reported(world, client):
    before = await world.hold("w0", 40)
    reader = await world.read()
    await world.kill(before)
    after = await world.hold("w0", 3)
    assert await reader.lookup(HASHES, LOOKUP_S) == [after.holding(HASHES)]
    assert after.incarnation != before.incarnation
    sweep(client)
    check_integrity(client)


async def test_of_two_processes_with_one_id_the_newer_writes_and_the_older_takes_over_after_it(world, client, caplog):
    older = await world.hold("twin", 10)
    newer = await world.hold("twin", 20)
    reader = await world.read()
    assert await reader.lookup(HASHES, LOOKUP_S) == [newer.holding(HASHES)]
    await until(lambda: older.writer.superseded_by == newer.incarnation, WAIT_S)
    older.add(HASHES[:30])
    assert await reader.lookup(HASHES, LOOKUP_S) == [newer.holding(HASHES)]
    assert any(newer.incarnation in message for message in errors(caplog.records))
    await world.leave(newer)
    await until(lambda: older.writer.superseded_by is None, WAIT_S)
    await older.synced()
    assert await reader.lookup(HASHES, LOOKUP_S) == [older.holding(HASHES)]
    sweep(client)
    check_integrity(client)


async def test_the_snapshot_is_announced_in_batches_and_may_be_awaited(world):
    async def blocks() -> list[tuple[bytes, Tier]]:
        return [(block_hash, Tier.HOST) for block_hash in HASHES]

    recorder = Recorder()
    writer = IndexWriter(world.url, "w0", "i", blocks, max_batch=16, observer=recorder)
    registered = registrar(world.url)
    await registered.start()
    await writer.start()
    await until(lambda: writer.synced, WAIT_S)
    assert recorder.batch_sizes == [16, 16, 8]
    assert recorder.announced == [40]
    reader = await world.read()
    assert await reader.lookup(HASHES, LOOKUP_S) == [Holding("w0", "i", 40, (0, 40, 0, 0))]
    await writer.close()
    await registered.close()


async def test_changes_during_the_announcement_prevail_over_the_snapshot(world, client):
    holder = Holder(world.url, max_batch=4)
    for block_hash in HASHES:
        holder.blocks[block_hash] = {Tier.DEVICE}

    def change(num_blocks: int, duration_s: float) -> None:
        if not holder.recorder.announced:  # after each slice of the snapshot, of blocks announced already and not yet
            holder.remove(HASHES[10:20])
            holder.add(HASHES[10:15], Tier.HOST)

    holder.recorder.batch_written = change  # type: ignore[method-assign]
    await world.start(holder)
    await until(lambda: bool(holder.recorder.announced), WAIT_S)
    await holder.synced()
    reader = await world.read()
    assert await reader.lookup(HASHES, LOOKUP_S) == [holder.holding(HASHES)]
    assert holder.holding(HASHES).num_per_tier == (10, 5, 0, 0)
    assert await reader.lookup(HASHES[15:], LOOKUP_S) == []
    check_integrity(client)


async def test_a_snapshot_that_fails_is_reported_and_tried_again(world, caplog):
    num_calls = 0

    def blocks() -> list[tuple[bytes, Tier]]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("the pool is busy")
        return [(HASHES[0], Tier.DEVICE)]

    writer = IndexWriter(world.url, "w0", "i", blocks, lease_s=LEASE_S)
    registered = registrar(world.url)
    await registered.start()
    await writer.start()
    await until(lambda: writer.synced, WAIT_S)
    assert num_calls == 2
    assert any("snapshot" in message for message in errors(caplog.records))
    await writer.close()
    await registered.close()


async def test_changes_that_wait_are_bounded_and_an_overflow_announces_everything(world, client):
    holder = await world.hold(num_blocks=5, max_pending=8, flush_s=0.05)
    holder.add(HASHES[5:12])
    assert holder.writer.num_pending == 7
    holder.remove(HASHES[:2])
    assert holder.writer.num_pending == 0
    holder.add(HASHES[12:15])
    assert not holder.writer.synced
    await holder.synced()
    assert holder.recorder.resyncs == [ResyncReason.START, ResyncReason.OVERFLOW]
    reader = await world.read()
    assert await reader.lookup(HASHES, LOOKUP_S) == []
    assert await reader.lookup(HASHES[2:], LOOKUP_S) == [holder.holding(HASHES[2:])]
    sweep(client)
    check_integrity(client)


async def test_many_changes_of_few_blocks_need_few_writes(world):
    holder = await world.hold(num_blocks=2, flush_s=0.05)
    holder.recorder.batch_sizes.clear()
    for _ in range(100):
        holder.remove(HASHES[:2])
        holder.add(HASHES[:2])
    await holder.synced()
    assert holder.recorder.batch_sizes == [2]
    reader = await world.read()
    await world.finds(reader, HASHES, [holder])


async def test_a_block_of_many_holders_keeps_its_bucket_compact_and_comes_back_into_it(world, client):
    holders = [await world.hold(f"w{i}", 2, lease_s=60.0) for i in range(32)]
    assert len(client.keys(BASE + b"*")) == 2
    holders += [await world.hold(f"w{i}", 2, lease_s=60.0) for i in range(32, 40)]
    buckets = [BASE + block_hash[:2] for block_hash in HASHES[:2]]
    wide = [BASE + block_hash[:8] for block_hash in HASHES[:2]]
    assert sorted(client.keys(BASE + b"*")) == sorted(buckets + wide)
    assert {client.object("encoding", bucket) for bucket in buckets} <= {b"ziplist", b"listpack"}
    reader = await world.read()
    await world.finds(reader, HASHES, holders)
    check_integrity(client)
    for holder in holders[4:36]:
        holder.remove(HASHES[:2])
        await holder.synced()
    await world.finds(reader, HASHES, holders)
    assert sorted(client.keys(BASE + b"*")) == sorted(buckets)
    check_integrity(client)


async def test_prefixes_separate_deployments(world, client):
    ours, theirs = await world.hold("w0", 10), await world.hold("w0", 20, prefix="other")
    reader, other = await world.read(), await world.read(prefix="other")
    await world.finds(reader, HASHES, [ours])
    await world.finds(other, HASHES, [theirs])


async def test_scripts_that_redis_forgot_are_sent_again(world, client):
    holder = await world.hold(num_blocks=10)
    reader = await world.read()
    client.script_flush()
    assert await reader.lookup(HASHES, LOOKUP_S) == [holder.holding(HASHES)]
    client.script_flush()
    holder.add(HASHES[10:20])
    await holder.synced()
    assert await reader.lookup(HASHES, LOOKUP_S) == [holder.holding(HASHES)]


async def test_when_all_slots_are_taken_a_holder_waits_for_one(world, client, caplog):
    with client.pipeline() as pipeline:
        for slot in range(1, 4096):
            pipeline.hset(f"{INDEX}:slots", str(slot), f"t i other-{slot}")
            pipeline.hset(f"{INDEX}:ids", f"other-{slot}", str(slot))
        pipeline.execute()
    writer = IndexWriter(world.url, "w0", "i", lambda: [(HASHES[0], Tier.DEVICE)], lease_s=LEASE_S)
    registered = registrar(world.url)
    await registered.start()
    await writer.start()
    await until(lambda: writer.connected, WAIT_S)
    assert not writer.synced
    client.delete(f"{INDEX}:slots")
    await until(lambda: writer.synced, WAIT_S)
    assert any("slot" in message for message in errors(caplog.records))
    await writer.close()
    await registered.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://10.0.0.1:6379/0", "redis://cache-2:6380/0"),
        (
            "rediss://:secret@a.example:6379/0?ssl_ca_certs=ca.pem",
            "rediss://:secret@cache-2:6380/0?ssl_ca_certs=ca.pem",
        ),
        ("redis://user:p%40ss@[::1]:7000", "redis://user:p%40ss@cache-2:6380"),
    ],
)
def test_a_redirection_changes_host_and_port_alone(url, expected):
    assert redirect(url, "cache-2", 6380) == expected


def test_a_redirection_without_a_host_means_the_same_and_an_ipv6_host_gets_brackets():
    assert redirect("redis://10.0.0.1:6379/0", "", 6380) == "redis://10.0.0.1:6380/0"
    assert redirect("redis://[::1]:6379/0", "", 6380) == "redis://[::1]:6380/0"
    assert redirect("redis://10.0.0.1:6379/0", "fd00::2", 6380) == "redis://[fd00::2]:6380/0"


def test_what_cannot_be_used_is_refused_by_name():
    for settings in ({"lease_s": 0.0}, {"flush_s": -1.0}, {"max_batch": 0}, {"max_pending": 0}, {"prefix": "a{b"}):
        with pytest.raises(RegistryError):
            IndexWriter("redis://127.0.0.1:1", "w0", "i", list, **settings)
    with pytest.raises(RegistryError, match="incarnation"):
        IndexWriter("redis://127.0.0.1:1", "w0", "i 1", list)
    with pytest.raises(RegistryError, match="malformed"):
        IndexReader("http://127.0.0.1:1")
    with pytest.raises(RegistryError, match="probe"):
        IndexReader("redis://127.0.0.1:1", probe_s=0.0)
