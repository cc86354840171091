"""The eviction policy: what outlives a flood, which end of a chain goes first, and what pins hold."""

from __future__ import annotations

import pytest

from kvstore.block import BlockHash
from kvstore.errors import DoubleFree, IntegrityError
from kvstore.pool import SegmentedLru
from kvstore.pool.eviction import Victim
from tests.tiers.blocks import chain, named_hash, parents
from tests.tiers.conversation_trace import (
    hit_rate_of_plain_lru,
    hit_rate_of_segmented_lru,
    hit_rate_without_bound,
    multi_turn_prompts,
)


def insert(policy: SegmentedLru, hashes: list[BlockHash], parent: BlockHash | None = None) -> None:
    for block_hash in hashes:
        policy.insert(block_hash, parent)
        parent = block_hash


def evict_all(policy: SegmentedLru) -> list[BlockHash]:
    evicted = []
    while (victim := policy.evict()) is not None:
        policy.check_integrity()
        evicted.append(victim.block_hash)
    return evicted


def test_a_system_prompt_outlives_a_flood_of_one_off_tails():
    policy = SegmentedLru(100)
    system = chain("system", 20)
    insert(policy, system)
    policy.touch(system)
    for number in range(200):
        tail = chain(f"tail{number}", 10)
        while len(policy) + len(tail) > 100:
            assert policy.evict() is not None
        insert(policy, tail, parent=system[-1] if number % 2 else None)
    assert all(block_hash in policy for block_hash in system)
    policy.check_integrity()


def test_a_chain_is_evicted_from_its_tail_whatever_the_order_of_its_insertion():
    hashes = chain("a", 5)
    for order in (range(5), reversed(range(5)), (2, 0, 4, 1, 3)):
        policy = SegmentedLru(8)
        for index in order:
            policy.insert(hashes[index], parents(hashes)[index])
        assert evict_all(policy) == hashes[::-1]


def test_the_least_recently_inserted_chain_goes_first_and_whole():
    policy = SegmentedLru(8)
    a, b = chain("a", 3), chain("b", 3)
    insert(policy, a)
    insert(policy, b)
    assert evict_all(policy) == [*a[::-1], *b[::-1]]


def test_a_shared_head_stays_while_one_of_its_tails_does():
    policy = SegmentedLru(16)
    head, left, right = chain("head", 2), chain("left", 2), chain("right", 2)
    insert(policy, head)
    insert(policy, left, head[-1])
    insert(policy, right, head[-1])
    policy.touch(head + left)
    assert evict_all(policy) == [*right[::-1], *left[::-1], *head[::-1]]


def test_a_use_in_the_middle_of_a_chain_protects_all_that_is_before_it():
    policy = SegmentedLru(100)
    hashes = chain("a", 6)
    insert(policy, hashes)
    policy.touch(hashes[3:5])
    assert [policy.is_protected(block_hash) for block_hash in hashes] == [True] * 5 + [False]
    policy.check_integrity()


def test_a_head_that_arrives_after_its_hot_tail_is_as_hot_as_the_tail():
    policy = SegmentedLru(20)
    hashes = chain("a", 3)
    policy.insert(hashes[2], hashes[1])
    policy.touch(hashes[2:])
    policy.insert(hashes[1], hashes[0])
    policy.insert(hashes[0], None)
    assert all(map(policy.is_protected, hashes))
    policy.check_integrity()
    insert(policy, chain("b", 2))
    assert evict_all(policy) == [*chain("b", 2)[::-1], *hashes[::-1]]


def test_the_protected_segment_is_bounded_and_its_coldest_get_one_more_chance():
    policy = SegmentedLru(10, protected_share=0.3)
    hot = [named_hash(f"hot{i}") for i in range(5)]
    cold = named_hash("cold")
    for block_hash in [*hot, cold]:
        policy.insert(block_hash, None)
    for block_hash in hot:
        policy.touch([block_hash])
    assert [policy.is_protected(block_hash) for block_hash in hot] == [False, False, True, True, True]
    assert policy.num_protected == policy.max_protected == 3
    assert evict_all(policy) == [cold, *hot]


def test_without_a_protected_segment_it_is_plain_lru():
    policy = SegmentedLru(4, protected_share=0.0)
    a, b, c = chain("x", 3)
    for block_hash in (a, b, c):
        policy.insert(block_hash, None)
    policy.touch([a])
    assert evict_all(policy) == [b, c, a]


def test_pins_hold_a_block_and_thereby_all_that_it_needs():
    policy = SegmentedLru(8)
    hashes = chain("a", 3)
    insert(policy, hashes)
    policy.pin(hashes[1])
    policy.pin(hashes[1])
    assert evict_all(policy) == [hashes[2]]
    policy.unpin(hashes[1])
    assert policy.evict() is None
    policy.unpin(hashes[1])
    assert evict_all(policy) == [hashes[1], hashes[0]]


def test_pins_that_hold_everything_cost_the_protected_no_rank():
    policy = SegmentedLru(8)
    hot, cold = chain("hot", 2), chain("cold", 2)
    insert(policy, hot)
    insert(policy, cold)
    policy.touch(hot)
    for block_hash in [*hot, *cold]:
        policy.pin(block_hash)
    assert policy.evict() is None
    for block_hash in [*hot, *cold]:
        policy.unpin(block_hash)
    assert all(map(policy.is_protected, hot))
    assert evict_all(policy) == [*cold[::-1], *hot[::-1]]


def test_protected_blocks_beyond_their_share_that_pins_held_go_back_when_room_is_needed():
    policy = SegmentedLru(8)
    a, b = chain("a", 8), chain("b", 6)
    insert(policy, a)
    for block_hash in a:
        policy.pin(block_hash)
    policy.touch(a)
    for block_hash in a:
        policy.unpin(block_hash)
    assert policy.num_protected == 8
    for block_hash, parent in zip(b, parents(b), strict=True):
        assert policy.evict(keep=parent) is not None
        policy.insert(block_hash, parent)
    assert [block_hash in policy for block_hash in [*a, *b]] == [True] * 2 + [False] * 6 + [True] * 6


def test_a_chain_too_long_for_probation_takes_from_the_protected_before_it_takes_from_itself():
    policy = SegmentedLru(8)
    a, b = chain("a", 8), chain("b", 8)
    insert(policy, a)
    policy.touch(a)
    for block_hash, parent in zip(b, parents(b), strict=True):
        assert policy.evict(keep=parent) is not None
        policy.insert(block_hash, parent)
    assert all(block_hash in policy for block_hash in b)
    policy.pin(b[-1])
    assert policy.evict() is None


def test_a_victim_says_whether_it_was_ever_used_again():
    policy = SegmentedLru(4, protected_share=0.0)
    a, b = chain("x", 2)
    policy.insert(a, None)
    policy.insert(b, None)
    policy.touch([a])
    assert (policy.evict(), policy.evict(), policy.evict()) == (Victim(b, False), Victim(a, True), None)


def test_a_block_taken_out_of_the_middle_leaves_both_parts_evictable():
    policy = SegmentedLru(8)
    hashes = chain("a", 4)
    insert(policy, hashes)
    policy.touch(hashes)
    policy.remove(hashes[1])
    policy.check_integrity()
    assert sorted(evict_all(policy)) == sorted([hashes[0], *hashes[2:]])


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_false_claim_of_a_circle_makes_nothing_immortal(length):
    policy = SegmentedLru(8)
    hashes = chain("a", length)
    for index in range(length):
        policy.insert(hashes[index], hashes[index - 1])  # the first names the last as its parent
    policy.check_integrity()
    policy.touch(hashes)
    assert sorted(evict_all(policy)) == sorted(hashes)


def test_misuse_is_refused():
    policy = SegmentedLru(4)
    (a,) = chain("a", 1)
    policy.insert(a, None)
    with pytest.raises(IntegrityError, match="which the policy has already"):
        policy.insert(a, None)
    with pytest.raises(DoubleFree, match="has no pin"):
        policy.unpin(a)
    with pytest.raises(DoubleFree, match="has no pin"):
        policy.unpin(named_hash("never seen"))
    policy.pin(a)
    with pytest.raises(IntegrityError, match="1 pins"):
        policy.remove(a)
    with pytest.raises(ValueError, match="capacity"):
        SegmentedLru(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda policy: setattr(policy, "num_protected", 7), "blocks are protected, counted 7"),
        (lambda policy: policy._num_children.clear(), "children are counted wrongly"),
        (lambda policy: policy._probation.clear(), "is in no heap"),
        (lambda policy: setattr(policy._nodes[chain("a", 3)[0]], "is_protected", False), "its parent is not"),
    ],
)
def test_damaged_bookkeeping_is_found(damage, message):
    policy = SegmentedLru(8)
    insert(policy, chain("a", 3))
    policy.touch(chain("a", 2))
    policy.check_integrity()
    damage(policy)
    with pytest.raises(IntegrityError, match=message):
        policy.check_integrity()


def test_repeated_use_does_not_pile_up_memory():
    policy = SegmentedLru(8)
    hashes = chain("a", 4)
    insert(policy, hashes)
    for _ in range(5_000):
        policy.touch(hashes)
        policy.pin(hashes[3])
        policy.unpin(hashes[3])
    assert len(policy._protected) + len(policy._probation) < 200
    policy.check_integrity()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("capacity", [300, 1_200])
def test_on_a_multi_turn_trace_it_hits_more_than_lru_and_most_where_room_is_short(seed, capacity):
    def prompts():
        return multi_turn_prompts(seed, num_prompts=1_000, one_off_share=0.4)

    segmented = hit_rate_of_segmented_lru(prompts(), capacity)
    gain_over_head_first = segmented - hit_rate_of_plain_lru(prompts(), capacity, tail_first=False)
    gain_over_tail_first = segmented - hit_rate_of_plain_lru(prompts(), capacity, tail_first=True)
    assert gain_over_tail_first > (0.015 if capacity == 300 else 0.002)
    assert gain_over_head_first > (0.035 if capacity == 300 else 0.002)
    assert segmented < hit_rate_without_bound(prompts())
