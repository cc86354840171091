"""Random histories of holders, faults and a Redis that forgets, against holders whose blocks are a dict."""

from __future__ import annotations

import asyncio

import pytest
import redis
import redis.asyncio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvstore.index import IndexWriter, Tier
from kvstore.index.scripts import WRITE, Script
from tests.prefix_index.index_world import (
    BASE,
    INDEX,
    LEASES,
    Holder,
    World,
    block_hashes,
    check_integrity,
    sweep,
)

HASHES = block_hashes(8)
IDS = ("w0", "w1", "w2")
LEASE_S = 0.45  # a lost index is noticed in a third of it


class FaultyWriter(IndexWriter):
    """A writer whose next batch meets a fault on its way."""

    next_fault = ""
    sent: tuple[tuple[str | bytes | int, ...], ...] = ()

    async def _call(self, client: redis.asyncio.Redis, script: Script, *arguments: str | bytes | int) -> object:
        is_batch = script is WRITE and arguments[-1] != b""
        fault, self.next_fault = (self.next_fault, "") if is_batch else ("", self.next_fault)
        if fault == "lost":
            raise redis.ConnectionError("the batch is lost")
        if fault == "late":  # earlier batches arrive once more, the newest first: left over in a broken connection
            for earlier in reversed(self.sent):
                await super()._call(client, script, *earlier)
        reply = await super()._call(client, script, *arguments)
        if fault == "repeated":
            again = await super()._call(client, script, *arguments)
            assert again == ([1, 0] if reply != [0] else [0])
        if is_batch:
            self.sent = (*self.sent[-3:], arguments)
        if fault == "reply lost":
            raise redis.ConnectionError("the reply is lost")
        return reply


class FaultyHolder(Holder):
    writer_class = FaultyWriter


class IndexMachine(RuleBasedStateMachine):
    """Each step ends when a lookup finds what the dicts say; `check_integrity` holds at any time."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = redis.Redis.from_url(self.url)
        self.client.flushall()
        self.world = World(self.url)
        self.reader = self.runner.run(self.world.read())

    def living(self, holder_id: str) -> Holder | None:
        return next((holder for holder in self.world.holders if holder.holder_id == holder_id), None)

    async def arrive(self, holder_id: str, blocks: dict[int, set[Tier]]) -> None:
        """A process starts. One of the same id that was there before is dead by then."""
        before = self.living(holder_id)
        if before is not None:
            await self.world.kill(before)
        holder = FaultyHolder(self.url, holder_id, lease_s=LEASE_S, max_batch=3)
        holder.blocks = {HASHES[index]: set(tiers) for index, tiers in blocks.items()}
        await self.world.start(holder)

    @rule(
        holder_id=st.sampled_from(IDS),
        blocks=st.dictionaries(st.integers(0, len(HASHES) - 1), st.sets(st.sampled_from(Tier), min_size=1)),
    )
    def start(self, holder_id, blocks):
        self.runner.run(self.arrive(holder_id, blocks))

    @precondition(lambda self: self.world.holders)
    @rule(
        data=st.data(),
        changes=st.lists(
            st.tuples(st.booleans(), st.integers(0, len(HASHES) - 1), st.integers(1, 8), st.sampled_from(Tier)),
            min_size=1,
            max_size=6,
        ),
        fault=st.sampled_from(["", "", "lost", "reply lost", "repeated", "late"]),
    )
    def change(self, data, changes, fault):
        holder = data.draw(st.sampled_from(self.world.holders))

        async def change() -> None:
            holder.writer.next_fault = fault
            for is_added, start, length, tier in changes:
                (holder.add if is_added else holder.remove)(HASHES[start : start + length], tier)

        self.runner.run(change())

    @precondition(lambda self: self.world.holders)
    @rule(data=st.data(), how=st.sampled_from(["leaves", "lease ends"]))
    def end(self, data, how):
        holder = data.draw(st.sampled_from(self.world.holders))
        if how == "leaves":
            self.runner.run(self.world.leave(holder))
        else:
            self.runner.run(self.world.kill(holder))
            self.client.zadd(LEASES, {holder.holder_id: 0}, xx=True)

    @precondition(lambda self: self.world.holders)
    @rule(data=st.data())
    def lease_ends_for_a_living_holder(self, data):
        holder = data.draw(st.sampled_from(self.world.holders))
        self.client.zadd(LEASES, {holder.holder_id: 0}, xx=True)
        sweep(self.client)

    @rule()
    def flush(self):
        self.client.flushall()

    @precondition(lambda self: self.world.holders)
    @rule(data=st.data())
    def redis_comes_back_without_the_last_batch(self, data):
        holder = data.draw(st.sampled_from(self.world.holders))
        slot = self.client.hget(f"{INDEX}:ids", holder.holder_id)
        if slot is not None:
            self.client.hincrby(f"{INDEX}:seqs", slot, -1)

    @rule()
    def somebody_sweeps(self):
        sweep(self.client)

    @invariant()
    def lookups_find_what_the_dicts_say(self):
        for start in (0, 3):
            self.runner.run(self.world.finds(self.reader, HASHES[start:], self.world.holders))
        check_integrity(self.client)

    def teardown(self):
        try:
            for holder in self.world.holders:  # who claims a slot just as it closes leaves it until its lease ends
                self.runner.run(holder.synced())
            self.runner.run(self.world.close())
            sweep(self.client)
            assert self.client.keys(BASE + b"*") == []
            assert self.client.keys(f"{INDEX}:held:*") == []
            check_integrity(self.client)
        finally:
            self.client.close()
            self.runner.close()


@pytest.mark.parametrize("max_examples", [12, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_the_index_agrees_with_dicts_whatever_happens(redis_server, max_examples):
    machine = type("BoundMachine", (IndexMachine,), {"url": redis_server.url})
    few = settings(
        max_examples=max_examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=few)
