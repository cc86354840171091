"""Holders whose blocks are a plain dict, what a lookup must find of them, and what must hold of the keys in Redis."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import redis

from kvstore.block import BlockHash
from kvstore.index import (
    IndexObserver,
    IndexReader,
    IndexWriter,
    ResyncReason,
    Tier,
)
from kvstore.index.entries import Holding
from kvstore.index.scripts import SWEEP, IndexKeys
from kvstore.index.session import LookupOutcome
from kvstore.registry import Registrar, WorkerRecord, new_incarnation
from tests.waiting import until

WAIT_S = 60.0  # an upper bound for waits on events, far above what any of them takes
LEASE_S = 0.6
LOOKUP_S = 5.0  # a deadline that no lookup in these tests may need
REDIS_S = 3.0  # nor any other answer of a Redis that is there

INDEX = IndexKeys.under("tandem").index
LEASES = "{tandem}:leases"  # the registry's
BASE = IndexKeys.under("tandem").base.encode()


def block_hashes(num_blocks: int, chain: str = "") -> list[BlockHash]:
    """Different hashes, the same in every run."""
    return [BlockHash(hashlib.blake2b(f"{chain}/{i}".encode(), digest_size=16).digest()) for i in range(num_blocks)]


class Recorder(IndexObserver):
    """Keeps what an observer hears."""

    def __init__(self) -> None:
        self.outcomes: list[LookupOutcome] = []
        self.batch_sizes: list[int] = []
        self.resyncs: list[ResyncReason] = []
        self.announced: list[int] = []

    def lookup_ended(self, outcome: LookupOutcome, num_blocks: int, num_held: int, duration_s: float) -> None:
        self.outcomes.append(outcome)

    def batch_written(self, num_blocks: int, duration_s: float) -> None:
        self.batch_sizes.append(num_blocks)

    def resync_started(self, reason: ResyncReason) -> None:
        self.resyncs.append(reason)

    def resync_ended(self, reason: ResyncReason, num_blocks: int, duration_s: float) -> None:
        self.announced.append(num_blocks)


def registrar(
    url: str, holder_id: str = "w0", incarnation: str = "i", lease_s: float = LEASE_S, prefix: str = "tandem"
) -> Registrar:
    """Announces a holder in the registry."""
    record = WorkerRecord(
        worker_id=holder_id,
        role="prefill",
        incarnation=incarnation,
        served_model_names=("m",),
        model_path="m",
        tokenizer_path="m",
        model_fingerprint="ab12",
        grpc_address="127.0.0.1:1",
        kv_address="127.0.0.1:2",
        http_address="",
        block_size=8,
        num_blocks=64,
        max_model_len=64,
        max_num_seqs=1,
        dtype="float32",
        transports=("ucxx",),
    )
    return Registrar(url, record, lease_s, prefix=prefix, timeout_s=REDIS_S)


class Holder:
    """A registered process with blocks: the truth as a dict, and the writer that tells the index of it."""

    writer_class: type[IndexWriter] = IndexWriter

    def __init__(self, url: str, holder_id: str = "w0", incarnation: str | None = None, **settings: object) -> None:
        self.holder_id = holder_id
        self.incarnation = incarnation or new_incarnation()
        self.blocks: dict[BlockHash, set[Tier]] = {}
        self.recorder = Recorder()
        arguments = {"lease_s": LEASE_S, "flush_s": 0.0, "timeout_s": REDIS_S, "observer": self.recorder, **settings}
        self.writer = self.writer_class(url, holder_id, self.incarnation, self.snapshot, **arguments)
        registered = {name: settings[name] for name in ("lease_s", "prefix") if name in settings}
        self.registrar = registrar(url, holder_id, self.incarnation, **registered)

    def snapshot(self) -> list[tuple[BlockHash, Tier]]:
        return [(block_hash, tier) for block_hash, tiers in self.blocks.items() for tier in sorted(tiers)]

    def add(self, hashes: Sequence[BlockHash], tier: Tier = Tier.DEVICE) -> None:
        for block_hash in hashes:
            self.blocks.setdefault(block_hash, set()).add(tier)
        self.writer.added(hashes, tier)

    def remove(self, hashes: Sequence[BlockHash], tier: Tier = Tier.DEVICE) -> None:
        for block_hash in hashes:
            self.blocks.get(block_hash, set()).discard(tier)
        self.writer.removed(hashes, tier)

    def holding(self, hashes: Sequence[BlockHash]) -> Holding | None:
        """What a lookup of `hashes` must say of us."""
        num_per_tier = [0, 0, 0, 0]
        for block_hash in hashes:
            tiers = self.blocks.get(block_hash)
            if not tiers:
                break
            num_per_tier[min(tiers)] += 1
        total = sum(num_per_tier)
        return Holding(self.holder_id, self.incarnation, total, tuple(num_per_tier)) if total else None

    async def synced(self) -> None:
        await until(lambda: self.writer.synced, WAIT_S)

    async def kill(self) -> None:
        """What SIGKILL does: it renews nothing any more and withdraws nothing."""
        for session in (self.writer, self.registrar):
            assert session._task is not None
            session._task.cancel()
            await asyncio.wait([session._task])

    async def close(self) -> None:
        await self.writer.close()
        await self.registrar.close()


def expected(holders: Iterable[Holder], hashes: Sequence[BlockHash]) -> set[Holding]:
    """What a lookup of `hashes` must find."""
    return {held for holder in holders if (held := holder.holding(hashes)) is not None}


class World:
    """Holders and readers of one Redis, all closed at the end of a test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.holders: list[Holder] = []
        self.readers: list[IndexReader] = []

    async def hold(self, holder_id: str = "w0", num_blocks: int = 0, **settings: object) -> Holder:
        """A holder that is in the index, with the first `num_blocks` of the default chain."""
        holder = Holder(self.url, holder_id, **settings)
        for block_hash in block_hashes(num_blocks):
            holder.blocks[block_hash] = {Tier.DEVICE}
        self.holders.append(holder)
        await holder.registrar.start()
        await until(lambda: holder.registrar.connected, WAIT_S)
        await holder.writer.start()
        await holder.synced()
        return holder

    async def start(self, holder: Holder) -> None:
        self.holders.append(holder)
        await holder.registrar.start()
        await holder.writer.start()

    async def kill(self, holder: Holder) -> None:
        await holder.kill()
        self.holders.remove(holder)

    async def leave(self, holder: Holder) -> None:
        await holder.close()
        self.holders.remove(holder)

    async def read(self, recorder: Recorder | None = None, **settings: object) -> IndexReader:
        reader = IndexReader(self.url, **{"timeout_s": REDIS_S, "probe_s": 0.1, "observer": recorder, **settings})
        self.readers.append(reader)
        await reader.start()
        await until(lambda: reader.available, WAIT_S)
        return reader

    async def finds(self, reader: IndexReader, hashes: Sequence[BlockHash], holders: Iterable[Holder]) -> None:
        """Wait until a lookup finds exactly what `holders` have."""
        wanted = expected(holders, hashes)
        found: set[Holding] = set()

        async def matches() -> bool:
            found.clear()
            found.update(await reader.lookup(hashes, LOOKUP_S))
            return found == wanted

        try:
            await eventually(matches)
        except TimeoutError:
            raise AssertionError(f"found {found}, not {wanted}") from None

    async def close(self) -> None:
        for member in [*self.holders, *self.readers]:
            await member.close()


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Return once `check()` holds. Redis has no event for it, so it is asked again and again."""
    async with asyncio.timeout(WAIT_S):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def sweep(client: redis.Redis) -> None:
    """Take out all entries of the dead, now."""
    client.delete(f"{INDEX}:sweeper")
    while client.eval(SWEEP.text, 1, INDEX, BASE, "test", 1000, 64, 1024):
        pass


# Every key of the index with its content, at one moment.
_DUMP = """
local commands = {hash = {'HGETALL'}, set = {'SMEMBERS'}, zset = {'ZRANGE', 0, -1}, string = {'GET'}}
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  local command = commands[redis.call('TYPE', key).ok]
  found[#found + 1] = key
  found[#found + 1] = redis.call(command[1], key, unpack(command, 2))
end
return found
"""


def check_integrity(client: redis.Redis) -> None:
    """Assert what must hold of the index's keys at any time."""
    flat = client.eval(_DUMP, 1, INDEX, "{tandem}:i*")
    keys = dict(zip(flat[0::2], flat[1::2], strict=True))

    def fields(suffix: str) -> dict[bytes, bytes]:
        pairs = keys.get(f"{INDEX}{suffix}".encode(), [])
        return dict(zip(pairs[0::2], pairs[1::2], strict=True))

    def slots_in(members: Iterable[bytes]) -> set[int]:
        return {int(slot) for slot in members}

    slots, dead = slots_in(fields(":slots")), slots_in(keys.get(f"{INDEX}:dead".encode(), ()))
    assert not slots & dead
    assert slots_in(fields(":ids").values()) == slots_in(fields(":seqs")) == slots
    held_prefix = f"{INDEX}:held:".encode()
    held = {int(key.removeprefix(held_prefix)): bits for key, bits in keys.items() if key.startswith(held_prefix)}
    assert held.keys() == slots | dead
    assert all(len(bits) == 8192 for bits in held.values())

    blocks = {key.removeprefix(BASE): content for key, content in keys.items() if key.startswith(BASE)}
    wide = {name: value for name, value in blocks.items() if len(name) == 8}
    buckets = {name: content for name, content in blocks.items() if len(name) == 2}
    assert len(wide) + len(buckets) == len(blocks)
    num_blocks = 0
    for name, content in buckets.items():
        number = int.from_bytes(name, "big")
        for field, value in zip(content[0::2], content[1::2], strict=True):
            num_blocks += 1
            assert len(field) == 6
            if value == b"*":
                value = wide.pop(name + field)
                assert len(value) > 32
            else:
                assert len(value) <= 64
            entries = [int.from_bytes(value[i : i + 2], "big") for i in range(0, len(value), 2)]
            assert entries
            assert all(entry & 15 for entry in entries)
            owners = [entry >> 4 for entry in entries]
            assert owners == sorted(set(owners))
            for slot in owners:
                assert held[slot][number // 8] >> (7 - number % 8) & 1, f"slot {slot} has no bit for bucket {number}"
    assert not wide, "entries that no bucket refers to"
    assert int(fields("").get(b"n", 0)) == num_blocks


def errors(caplog_records: Iterable[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in caplog_records if record.levelno >= logging.ERROR]
