"""Redis flushed, killed, paused, full of garbage, behind a password, TLS, a cluster: hints come and go, no error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import redis

from kvstore.index import IndexReader, ResyncReason, Tier
from kvstore.index.session import LookupOutcome
from kvstore.registry import ConnectionState, Registrar, next_incarnation, open_home
from services.cli.embedded_redis import EmbeddedRedis, find_redis_server
from services.router.sharing import Quotas, Share
from tests.ports import free_port
from tests.prefix_index.index_world import (
    BASE,
    INDEX,
    LOOKUP_S,
    WAIT_S,
    Holder,
    Recorder,
    World,
    block_hashes,
    check_integrity,
    errors,
    eventually,
    sweep,
)
from tests.waiting import until
from tests.worker_records import worker_record

HASHES = block_hashes(40)


def slot_of(client: redis.Redis, holder: Holder) -> bytes:
    slot = client.hget(f"{INDEX}:ids", holder.holder_id)
    assert isinstance(slot, bytes)
    return slot


async def test_a_flushed_redis_is_full_again_without_anyone_asking(world, client, caplog):
    holders = [await world.hold(f"w{i}", 10 * i) for i in range(1, 4)]
    reader = await world.read()
    client.flushall()
    assert await reader.lookup(HASHES, LOOKUP_S) == []
    await world.finds(reader, HASHES, holders)
    assert all(holder.recorder.resyncs == [ResyncReason.START, ResyncReason.LOST] for holder in holders)
    assert errors(caplog.records) == []
    check_integrity(client)


async def test_an_older_state_of_redis_is_noticed_by_the_next_write(world, client):
    holder = await world.hold(num_blocks=10)
    reader = await world.read()
    kept = {key: client.dump(key) for key in client.keys("*")}
    holder.remove(HASHES[:4])
    holder.add(HASHES[20:30])
    await holder.synced()
    client.flushall()
    for key, value in kept.items():  # as from a dump on disk, or a replica that lagged behind
        client.restore(key, 0, value)
    await world.finds(reader, HASHES[20:], [holder])
    assert holder.recorder.resyncs == [ResyncReason.START, ResyncReason.LOST]
    assert await reader.lookup(HASHES, LOOKUP_S) == []
    await world.finds(reader, HASHES[4:], [holder])
    sweep(client)
    check_integrity(client)


async def test_redis_killed_and_restarted_loses_hints_for_a_while_and_nothing_else(own_server, own_world, caplog):
    caplog.set_level(logging.WARNING)
    holder = await own_world.hold(num_blocks=10)
    recorder = Recorder()
    reader = await own_world.read(recorder)
    os.kill(own_server.pid, signal.SIGKILL)
    await until(lambda: not reader.connected, WAIT_S)
    recorder.outcomes.clear()
    for _ in range(100):
        assert await reader.lookup(HASHES) == []
    assert recorder.outcomes == [LookupOutcome.SKIPPED] * 100
    await until(lambda: not holder.writer.connected, WAIT_S)
    holder.add(HASHES[10:20])
    assert not holder.writer.synced
    with own_server.start_again():
        await holder.synced()
        await until(lambda: reader.available, WAIT_S)
        await own_world.finds(reader, HASHES, [holder])
        await own_world.close()
    assert errors(caplog.records) == []
    failures = [
        record.getMessage() for record in caplog.records if "trying again: ConnectionError" in record.getMessage()
    ]
    assert len(failures) == 3, "once per session"


async def test_a_paused_redis_costs_one_deadline_and_then_nothing(own_server, own_world, caplog):
    holder = await own_world.hold(num_blocks=10)
    recorder = Recorder()
    # Neither the call's own time limit nor the next probe can end what is tested here.
    reader = await own_world.read(recorder, timeout_s=WAIT_S, probe_s=WAIT_S)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        for _ in range(40):  # 2 s
            assert await reader.lookup(HASHES, timeout_s=0.05) == []
            await asyncio.sleep(0.05)
        assert recorder.outcomes == [LookupOutcome.TIMED_OUT] + [LookupOutcome.SKIPPED] * 39
        holder.add(HASHES[10:20])
    finally:
        os.kill(own_server.pid, signal.SIGCONT)

    async def is_available() -> bool:
        return reader.available

    await eventually(is_available)
    await own_world.finds(reader, HASHES, [holder])
    assert errors(caplog.records) == []


async def test_lookups_that_wait_together_for_a_paused_redis_all_meet_their_deadline(own_server, own_world):
    await own_world.hold(num_blocks=10)
    recorder = Recorder()
    reader = await own_world.read(recorder, timeout_s=0.2)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(WAIT_S):
            assert await asyncio.gather(*(reader.lookup(HASHES, 0.05) for _ in range(50))) == [[]] * 50
        assert recorder.outcomes == [LookupOutcome.TIMED_OUT] * 50
        await until(lambda: reader.connection_state is ConnectionState.DISCONNECTED, WAIT_S)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)


async def test_a_connection_that_breaks_under_a_lookup_gives_nothing_and_is_made_anew(world, client):
    holder = await world.hold(num_blocks=10)
    recorder = Recorder()
    reader = await world.read(recorder)
    client.execute_command("CLIENT", "PAUSE", 300, "ALL")
    lookup = asyncio.create_task(reader.lookup(HASHES, LOOKUP_S))
    await asyncio.sleep(0.02)  # it is on its way
    client.execute_command("CLIENT", "UNPAUSE")
    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert await lookup in ([], [holder.holding(HASHES)])
    await world.finds(reader, HASHES, [holder])


async def test_members_start_before_redis_does(own_server, caplog):
    own_server.close()
    world = World(own_server.url)
    holder = Holder(own_server.url)
    holder.blocks[HASHES[0]] = {Tier.DEVICE}
    await world.start(holder)
    reader = IndexReader(own_server.url, probe_s=0.1)
    world.readers.append(reader)
    await reader.start()
    assert await reader.lookup(HASHES) == []
    with own_server.start_again():
        await until(lambda: reader.available, WAIT_S)
        await world.finds(reader, HASHES, [holder])
        await world.close()
    assert errors(caplog.records) == []


async def test_closing_without_redis_raises_nothing(own_server, own_world):
    await own_world.hold(num_blocks=3)
    reader = await own_world.read()
    own_server.close()
    lookups = [asyncio.create_task(reader.lookup(HASHES, WAIT_S)) for _ in range(3)]
    await own_world.close()
    assert await asyncio.gather(*lookups) == [[]] * 3
    assert await reader.lookup(HASHES) == []


GARBAGE = [
    ("SET", BASE + HASHES[0][:2], "not a hash"),
    ("HSET", BASE + HASHES[0][:2], HASHES[0][2:8], "odd"),
    ("HSET", BASE + HASHES[0][:2], HASHES[0][2:8], ""),
    ("HSET", BASE + HASHES[0][:2], HASHES[0][2:8], "*"),
    ("HSET", BASE + HASHES[0][:2], HASHES[0][2:8], b"\xff" * 60),
    ("HSET", f"{INDEX}:slots", "7", "rubbish"),
    ("HSET", f"{INDEX}:slots", "rubbish", "a b c"),
    ("HSET", f"{INDEX}:seqs", "SLOT", "rubbish"),
    ("HSET", INDEX, "v", "rubbish"),
    ("SET", f"{INDEX}:sweeper", "somebody"),
    ("SET", f"{INDEX}:held:SLOT", "short"),
    *[("SET", f"{INDEX}{suffix}", "rubbish") for suffix in ("", ":slots", ":ids", ":seqs", ":dead")],
    ("RPUSH", f"{INDEX}:held:SLOT", "rubbish"),
    ("RPUSH", f"{INDEX}:sweeper", "rubbish"),
]


@pytest.mark.parametrize(
    "command", GARBAGE, ids=lambda command: f"{command[0]}-{str(command[1])[-12:]}-{command[-1]!r}"
)
async def test_garbage_in_redis_costs_hints_and_is_repaired(world, client, command, caplog):
    holder = await world.hold(num_blocks=10)
    reader = await world.read()
    slot = slot_of(client, holder).decode()
    command = [word.replace("SLOT", slot) if isinstance(word, str) else word for word in command]
    if command[0] in ("SET", "RPUSH"):
        client.delete(command[1])
    client.execute_command(*command)
    for hashes in (HASHES, HASHES[1:]):
        for held in await reader.lookup(hashes, LOOKUP_S):
            assert held.holder_id == "w0"
    holder.remove(HASHES[:10])
    holder.add(HASHES[:10])
    holder.add(HASHES[10:12])
    await world.finds(reader, HASHES, [holder])
    assert not any(record.levelno >= logging.CRITICAL for record in caplog.records)
    await world.leave(holder)
    assert await reader.lookup(HASHES, LOOKUP_S) == []


@pytest.mark.parametrize("key", [f"{INDEX}:ids", f"{INDEX}:slots", "{tandem}:departed"])
@pytest.mark.parametrize("damage", ["lost", "not ours"])
async def test_a_holder_that_dies_while_its_name_is_lost_does_not_stay_in_the_index(world, client, key, damage):
    stays, dies = await world.hold("stays", 10), await world.hold("dies", 40)
    reader = await world.read()
    await world.kill(dies)
    client.delete(key)
    if damage == "not ours":
        client.set(key, "rubbish")
    await world.finds(reader, HASHES, [stays])


async def test_a_password_is_taken_from_the_url(own_server):
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", "s3cret/ä")
    world = World(f"redis://:s3cret%2F%C3%A4@127.0.0.1:{own_server.port}/0")
    holder = await world.hold(num_blocks=3)
    await world.finds(await world.read(), HASHES, [holder])
    await world.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, pem = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-keyout", str(key), "-out", str(pem), *subject]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
    return key, pem


@pytest.fixture
async def tls_port(own_server: EmbeddedRedis, certificate: tuple[Path, Path]) -> AsyncIterator[int]:
    """A port where TLS ends and the server begins: the embedded one is built without TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    connections: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", own_server.port)
        try:
            await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        finally:
            inner_writer.close()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for task in connections:
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


async def test_tls_is_spoken_where_the_url_says_so(own_server, tls_port, certificate):
    url = own_server.url.replace("redis://", "rediss://").replace(f":{own_server.port}", f":{tls_port}")
    world = World(f"{url}?ssl_ca_certs={certificate[1]}")
    holder = await world.hold(num_blocks=3)
    await world.finds(await world.read(), HASHES, [holder])
    await world.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[str]]:
    """URLs of a cluster's two nodes; the first has no slot of ours."""
    processes, urls = [], []
    try:
        for number in range(2):
            directory = tmp_path / str(number)
            directory.mkdir()
            port = free_port(also_above=10_000)  # where the cluster's bus is
            command = [find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes"]
            command += ["--save", "", "--dir", str(directory), "--logfile", str(directory / "log")]
            processes.append(subprocess.Popen(command))
            urls.append(f"redis://127.0.0.1:{port}/0")
        yield urls
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def form_cluster(urls: list[str]) -> None:
    with redis.Redis.from_url(urls[0]) as first, redis.Redis.from_url(urls[1]) as second:

        async def answers() -> bool:
            try:
                return bool(first.ping() and second.ping())
            except redis.ConnectionError:
                return False

        await eventually(answers)
        ours = first.execute_command("CLUSTER", "KEYSLOT", INDEX)
        first.execute_command("CLUSTER", "ADDSLOTS", *[slot for slot in range(16384) if slot != ours])
        second.execute_command("CLUSTER", "ADDSLOTS", ours)
        second.execute_command("CLUSTER", "SET-CONFIG-EPOCH", 2)
        first.execute_command("CLUSTER", "MEET", "127.0.0.1", urls[1].rpartition(":")[2].partition("/")[0])

        async def agrees() -> bool:
            info = [node.execute_command("CLUSTER", "INFO") for node in (first, second)]
            return all(b"cluster_state:ok" in found for found in info)

        await eventually(agrees)


async def test_in_a_cluster_any_node_leads_to_the_index_the_limits_and_the_start_before(cluster):
    await form_cluster(cluster)
    world = World(cluster[0])
    holder, leaves = await world.hold("w0", 10), await world.hold("w1", 5)
    reader = await world.read()
    await world.finds(reader, HASHES, [holder, leaves])
    await world.leave(leaves)
    assert await reader.lookup(HASHES, LOOKUP_S) == [holder.holding(HASHES)]
    async with AsyncExitStack() as homes:
        routers = [
            Quotas(await homes.enter_async_context(open_home(url, 30)), url, time.monotonic, timeout_s=30)
            for url in cluster
        ]
        share = Share(max_concurrent=3)
        taken = [
            await router.take("t", share, f"{id(router)} {number}", 0, 600) for number in (0, 1) for router in routers
        ]
        assert [(each.is_local, each.verdict.refused) for each in taken] == [(False, "")] * 3 + [(False, "concurrent")]
    before = worker_record(
        worker_id="w", incarnation=f"{time.time_ns() + 10**15:016x}{0:08x}"
    )  # the clock was set back
    registrar = Registrar(cluster[0], before)
    await registrar.start()
    await until(lambda: registrar.connected, WAIT_S)
    assert await next_incarnation(cluster[0], "w") > before.incarnation
    await registrar.close()
    with redis.Redis.from_url(cluster[0]) as first, redis.Redis.from_url(cluster[1]) as second:
        assert (first.dbsize(), second.exists(INDEX)) == (0, 1)
        sweep(second)
        check_integrity(second)
    await world.close()
