"""Paged pool and host tier against a dumb model: random operations, no wrong byte under any hash, sound books."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockHash
from kvstore.pool.slot_book import Block, CacheEvent
from tests.host_tier.paged_pool import PagedPool
from tests.tiers.blocks import chain, payload, proof

# Few chains with few blocks, two of them with a common head, so that they meet in both tiers.
CHAINS = [chain("a", 5), chain("a", 3) + chain("a'", 2), chain("b", 5), chain("c", 4)]


class HostTierMachine(RuleBasedStateMachine):
    """Requests come, find what is cached, bring back what was evicted, compute the rest, and go."""

    @initialize(num_blocks=st.integers(5, 12), num_slots=st.integers(1, 12))
    def start(self, num_blocks: int, num_slots: int) -> None:
        self.world = PagedPool(num_blocks, num_slots)
        self.requests: list[list[int]] = []
        self.pinned: list[list[Block]] = []
        self.found: set[BlockHash] = set()  # as an index is told
        self.ever_computed: set[BlockHash] = set()
        self.flipped: set[BlockHash] = set()  # in the host tier, now

    @rule(hashes=st.sampled_from(CHAINS), length=st.integers(1, 5), goes=st.integers(0, 3))
    def serve(self, hashes: list[BlockHash], length: int, goes: int) -> None:
        """As an engine does it. One in four requests stays for a while."""
        hashes = hashes[:length]
        self.world.bring_back(hashes)
        pool = self.world.pool
        ids = pool.match_prefix(hashes)
        for block_id, block_hash in zip(ids, hashes, strict=False):
            assert bytes(self.world.memory.view(block_id)) == bytes(payload(block_hash)), "a wrong byte was served"
        if len(hashes) - len(ids) > pool.num_free:
            pool.release(ids)
            return
        fresh = self.world.take(len(hashes) - len(ids))
        for index, block_id in enumerate(fresh, start=len(ids)):
            self.world.memory.view(block_id)[:] = payload(hashes[index])
            pool.publish(block_id, hashes[index], hashes[index - 1] if index else None, proof=proof(hashes[index]))
        self.ever_computed.update(hashes)
        if goes:
            pool.release(ids + fresh)
        else:
            self.requests.append(ids + fresh)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.world.pool.release(self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1))))

    @rule(share=st.integers(1, 4))
    def others_want_memory(self, share: int) -> None:
        self.world.pool.release(self.world.take(self.world.pool.num_free // share))

    @rule(hashes=st.sampled_from(CHAINS))
    def serve_and_forget(self, hashes: list[BlockHash]) -> None:
        """What is served is evicted at once, and can be found in main memory."""
        self.serve(hashes, len(hashes), goes=1)
        self.world.evict_all()

    @rule(hashes=st.sampled_from(CHAINS))
    def a_restore_begins(self, hashes: list[BlockHash]) -> None:
        self.pinned.append(self.world.tier.pin(hashes))

    @precondition(lambda self: self.pinned)
    @rule()
    def a_restore_comes_to_nothing(self) -> None:
        self.world.tier.unpin(self.pinned.pop())

    @rule(data=st.data())
    def a_bit_flips(self, data: st.DataObject) -> None:
        whole = sorted(set(self.world.tier.hashes()) - self.flipped)
        if whole:
            block_hash = data.draw(st.sampled_from(whole))
            self.world.flip_byte(block_hash)
            self.flipped.add(block_hash)

    @invariant()
    def books_are_sound(self) -> None:
        if not hasattr(self, "world"):
            return
        tier = self.world.tier
        held: dict[int, int] = {}
        for block_id in (block_id for ids in self.requests for block_id in ids):
            held[block_id] = held.get(block_id, 0) + 1
        self.world.pool.check_integrity(held)
        tier.check_integrity()
        for change in tier.take_changes():
            is_present = change.event is not CacheEvent.EVICTED
            assert (change.block_hash in self.found) == (change.event is not CacheEvent.PUBLISHED), "told twice"
            (self.found.add if is_present else self.found.discard)(change.block_hash)
        assert self.found == set(tier.hashes())
        assert self.found <= self.ever_computed
        self.flipped &= self.found
        assert tier.state()["num_blocks"] <= tier.state()["num_slots"]


HostTierMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestHostTierAgainstModel = HostTierMachine.TestCase
