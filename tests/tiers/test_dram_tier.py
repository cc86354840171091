"""The memory tier: slots in one state each, pins that hold, and evicted blocks handed over while still there."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockHash, HostMemory
from kvstore.errors import DoubleFree, IntegrityError
from kvstore.pool import DramTier, PinnedBlock, ResidentBlock
from tests.tiers.blocks import BLOCK_BYTES, chain, named_hash, parents, payload, proof


def make_tier(num_slots: int = 8, **callbacks) -> DramTier:
    return DramTier(HostMemory.allocate(num_slots, BLOCK_BYTES), **callbacks)


def insert(tier: DramTier, hashes: list[BlockHash], first_parent: BlockHash | None = None) -> list[int]:
    slots = tier.begin_insert(len(hashes))
    assert len(slots) == len(hashes)
    for slot, block_hash, parent in zip(slots, hashes, [first_parent, *hashes[:-1]], strict=True):
        tier.memory.view(slot)[:] = payload(block_hash)
        assert tier.publish(slot, block_hash, parent, proof(block_hash))
    return slots


def test_a_block_is_found_once_published_and_not_before():
    tier = make_tier()
    a = chain("a", 3)
    slots = tier.begin_insert(3)
    assert slots == [0, 1, 2]
    assert (tier.prefix_length(a), tier.num_private, tier.num_free) == (0, 3, 5)
    for slot, block_hash, parent in zip(slots, a, parents(a), strict=True):
        assert tier.publish(slot, block_hash, parent, proof(block_hash))
    assert (tier.prefix_length(a), tier.contains(a[2]), len(tier), tier.num_private) == (3, True, 3, 0)
    assert tier.find(a[1]) == ResidentBlock(1, a[1], a[0], proof(a[1]), False)
    assert list(tier.hashes()) == a
    tier.check_integrity(expected_pins=0)


def test_pins_cover_the_consecutive_prefix_and_count_as_use():
    tier = make_tier()
    a = chain("a", 3)
    insert(tier, a)
    pinned = tier.pin([*a[:2], named_hash("absent"), a[2]])
    assert pinned == [PinnedBlock(0, a[0], proof(a[0])), PinnedBlock(1, a[1], proof(a[1]))]
    assert tier.find(a[1]).was_reused
    assert not tier.find(a[2]).was_reused
    assert (tier.stats.num_queried, tier.stats.num_hits) == (4, 2)
    tier.pin(a[2:], is_use=False)
    assert not tier.find(a[2]).was_reused
    tier.check_integrity(expected_pins=3)
    tier.unpin([0, 1, 2])
    tier.check_integrity(expected_pins=0)
    with pytest.raises(DoubleFree):
        tier.unpin([0])
    with pytest.raises(DoubleFree, match="slot 7, which holds no block"):
        tier.unpin([7])


def test_pinned_blocks_are_never_evicted_and_an_insertion_gets_fewer():
    tier = make_tier(4)
    insert(tier, chain("a", 2))
    b = chain("b", 2)
    insert(tier, b)
    tier.pin(b)
    slots = tier.begin_insert(4)
    assert sorted(slots) == [0, 1]
    assert (tier.prefix_length(b), tier.prefix_length(chain("a", 2))) == (2, 0)
    tier.abandon(slots)
    assert tier.num_free == 2
    tier.check_integrity(expected_pins=2)


def test_evicted_blocks_are_handed_over_with_their_bytes_before_their_slot_is_reused():
    kept: dict[BlockHash, bytes] = {}
    tier = make_tier(4, on_evict=lambda block: kept.update({block.block_hash: tier.memory.view(block.slot).tobytes()}))
    a = chain("a", 4)
    insert(tier, a)
    tier.pin(a[:1])
    tier.unpin([0])
    insert(tier, chain("b", 3))
    assert kept == {block_hash: payload(block_hash).tobytes() for block_hash in a[1:]}
    assert tier.stats.num_evicted == 3


def test_changes_are_reported_for_an_index():
    changes = []
    tier = make_tier(2, on_change=lambda block_hash, is_present: changes.append((block_hash, is_present)))
    a, b = chain("a", 2), chain("b", 1)
    insert(tier, a)
    insert(tier, b)
    tier.drop(b[0])
    assert changes == [(a[0], True), (a[1], True), (a[1], False), (b[0], True), (b[0], False)]


def test_the_same_block_published_twice_keeps_the_first_and_frees_the_second():
    tier = make_tier()
    (a,) = chain("a", 1)
    insert(tier, [a])
    (slot,) = tier.begin_insert(1)
    assert not tier.publish(slot, a, None, proof(a))
    assert (len(tier), tier.num_free, tier.num_private) == (1, 7, 0)
    tier.check_integrity()


def test_only_private_slots_can_be_published_or_abandoned():
    tier = make_tier()
    (a,) = chain("a", 1)
    (slot,) = insert(tier, [a])
    with pytest.raises(IntegrityError, match="publish of slot 0, which is not private"):
        tier.publish(slot, a, None, 0)
    with pytest.raises(IntegrityError, match="abandon of slot 0, which is not private"):
        tier.abandon([slot])
    with pytest.raises(ValueError, match="cannot insert -1 blocks"):
        tier.begin_insert(-1)


def test_a_dropped_block_is_gone_for_new_readers_and_stays_for_those_who_read():
    tier = make_tier(2)
    (a,) = chain("a", 1)
    (slot,) = insert(tier, [a])
    tier.pin([a])
    tier.pin([a])
    assert tier.drop(a)
    assert not tier.drop(a)
    assert (tier.pin([a]), tier.contains(a), tier.num_free) == ([], False, 1)
    (other,) = tier.begin_insert(1)
    assert not tier.publish(other, a, None, proof(a)), "its hash is still taken"
    tier.unpin([slot])
    tier.check_integrity(expected_pins=1)
    tier.unpin([slot])
    assert tier.num_free == 2
    insert(tier, [a])
    tier.check_integrity(expected_pins=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tier: tier._free.pop(), "slots"),
        (lambda tier: tier._published.clear(), "do not match"),
        (lambda tier: tier._policy.remove(chain("a", 2)[1]), "the policy knows 1 blocks of 2"),
        (lambda tier: tier._policy.pin(chain("a", 2)[0]), "1 pins, their holders count 0"),
    ],
)
def test_damaged_bookkeeping_is_found(damage, message):
    tier = make_tier()
    insert(tier, chain("a", 2))
    tier.check_integrity(expected_pins=0)
    damage(tier)
    with pytest.raises(IntegrityError, match=message):
        tier.check_integrity(expected_pins=0)


CHAINS = [chain("a", 4), chain("a", 2) + chain("b", 3), chain("c", 5)]
NUM_SLOTS = 6


class DramTierMachine(RuleBasedStateMachine):
    """Against a dict: what is found has its right bytes, what was pinned stays, everything evicted was handed over."""

    @initialize()
    def start(self) -> None:
        self.tier = make_tier(NUM_SLOTS, on_evict=self.evicted, on_change=self.changed)
        self.present: set[BlockHash] = set()
        self.private: list[int] = []
        self.pins: list[PinnedBlock] = []
        self.dropped_while_pinned: set[BlockHash] = set()

    def evicted(self, block: ResidentBlock) -> None:
        assert block.block_hash not in {pin.block_hash for pin in self.pins}
        assert self.tier.memory.view(block.slot).tobytes() == payload(block.block_hash).tobytes()

    def changed(self, block_hash: BlockHash, is_present: bool) -> None:
        assert (block_hash in self.present) != is_present
        (self.present.add if is_present else self.present.remove)(block_hash)

    @rule(num_blocks=st.integers(0, 4))
    def begin(self, num_blocks: int) -> None:
        slots = self.tier.begin_insert(num_blocks)
        held = {pin.slot for pin in self.pins}.union(self.private)
        assert len(slots) == len(set(slots)) <= num_blocks
        assert held.isdisjoint(slots)
        self.private += slots
        for slot in slots:
            self.tier.memory.view(slot)[:] = 0xEE

    @precondition(lambda self: self.private)
    @rule(prompt=st.sampled_from(CHAINS), index=st.integers(0, 4))
    def publish(self, prompt: list[BlockHash], index: int) -> None:
        slot = self.private.pop()
        index = min(index, len(prompt) - 1)
        block_hash = prompt[index]
        self.tier.memory.view(slot)[:] = payload(block_hash)
        is_known = block_hash in self.present or block_hash in self.dropped_while_pinned
        assert self.tier.publish(slot, block_hash, parents(prompt)[index], proof(block_hash)) == (not is_known)

    @precondition(lambda self: self.private)
    @rule()
    def abandon(self) -> None:
        self.tier.abandon([self.private.pop()])

    @rule(prompt=st.sampled_from(CHAINS))
    def pin(self, prompt: list[BlockHash]) -> None:
        pinned = self.tier.pin(prompt)
        assert len(pinned) == self.tier.prefix_length(prompt)
        self.pins += pinned

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.tier.unpin([pin.slot])
        self.dropped_while_pinned &= {held.block_hash for held in self.pins}

    @rule(prompt=st.sampled_from(CHAINS), index=st.integers(0, 4))
    def drop(self, prompt: list[BlockHash], index: int) -> None:
        block_hash = prompt[min(index, len(prompt) - 1)]
        if self.tier.drop(block_hash) and block_hash in {pin.block_hash for pin in self.pins}:
            self.dropped_while_pinned.add(block_hash)

    @invariant()
    def holds(self) -> None:
        self.tier.check_integrity(expected_pins=len(self.pins))
        assert set(self.tier.hashes()) == self.present
        for pin in self.pins:
            assert self.tier.memory.view(pin.slot).tobytes() == payload(pin.block_hash).tobytes()
        for block_hash in self.present:
            found = self.tier.find(block_hash)
            assert self.tier.memory.digests([found.slot]) == [found.proof] == [proof(block_hash)]


TestDramTierAgainstADict = DramTierMachine.TestCase
TestDramTierAgainstADict.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
