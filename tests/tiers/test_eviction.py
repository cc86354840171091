"""The eviction cache: what outlives a flood, which end of a chain goes first, and what pins hold."""

from __future__ import annotations

import pytest

from kvstore.block import BlockHash
from kvstore.errors import IntegrityError
from tests.tiers.blocks import Cache, chain, named_hash, parents
from tests.tiers.conversation_trace import (
    hit_rate_of_plain_lru,
    hit_rate_of_segmented_lru,
    hit_rate_without_bound,
    multi_turn_prompts,
)


def insert(cache: Cache, hashes: list[BlockHash], parent: BlockHash | None = None) -> None:
    for block_hash in hashes:
        cache.insert(block_hash, parent)
        parent = block_hash


def evict_all(cache: Cache) -> list[BlockHash]:
    evicted = []
    while (victim := cache.evict()) is not None:
        cache.check_integrity()
        evicted.append(victim.block_hash)
    return evicted


def test_a_system_prompt_outlives_a_flood_of_one_off_tails():
    cache = Cache(100)
    system = chain("system", 20)
    insert(cache, system)
    cache.touch(system)
    for number in range(200):
        tail = chain(f"tail{number}", 10)
        while len(cache) + len(tail) > 100:
            assert cache.evict() is not None
        insert(cache, tail, parent=system[-1] if number % 2 else None)
    assert all(map(cache.contains, system))
    cache.check_integrity()


def test_a_chain_is_evicted_from_its_tail_whatever_the_order_of_its_insertion():
    hashes = chain("a", 5)
    for order in (range(5), reversed(range(5)), (2, 0, 4, 1, 3)):
        cache = Cache(8)
        for index in order:
            cache.insert(hashes[index], parents(hashes)[index])
        assert evict_all(cache) == hashes[::-1]


def test_the_least_recently_inserted_chain_goes_first_and_whole():
    cache = Cache(8)
    a, b = chain("a", 3), chain("b", 3)
    insert(cache, a)
    insert(cache, b)
    assert evict_all(cache) == [*a[::-1], *b[::-1]]


def test_a_shared_head_stays_while_one_of_its_tails_does():
    cache = Cache(16)
    head, left, right = chain("head", 2), chain("left", 2), chain("right", 2)
    insert(cache, head)
    insert(cache, left, head[-1])
    insert(cache, right, head[-1])
    cache.touch(head + left)
    assert evict_all(cache) == [*right[::-1], *left[::-1], *head[::-1]]


def test_a_use_in_the_middle_of_a_chain_protects_all_that_is_before_it():
    cache = Cache(100)
    hashes = chain("a", 6)
    insert(cache, hashes)
    cache.touch(hashes[3:5])
    assert [cache.is_protected(block_hash) for block_hash in hashes] == [True] * 5 + [False]
    cache.check_integrity()


def test_a_head_that_arrives_after_its_hot_tail_is_as_hot_as_the_tail():
    cache = Cache(20)
    hashes = chain("a", 3)
    cache.insert(hashes[2], hashes[1])
    cache.touch(hashes[2:])
    cache.insert(hashes[1], hashes[0])
    cache.insert(hashes[0], None)
    assert all(map(cache.is_protected, hashes))
    cache.check_integrity()
    insert(cache, chain("b", 2))
    assert evict_all(cache) == [*chain("b", 2)[::-1], *hashes[::-1]]


def test_the_protected_segment_is_bounded_and_its_coldest_get_one_more_chance():
    cache = Cache(10, protected_share=0.3)
    hot = [named_hash(f"hot{i}") for i in range(5)]
    cold = named_hash("cold")
    for block_hash in [*hot, cold]:
        cache.insert(block_hash, None)
    for block_hash in hot:
        cache.touch([block_hash])
    assert [cache.is_protected(block_hash) for block_hash in hot] == [False, False, True, True, True]
    assert cache.segments.num_protected == cache.segments.max_protected == 3
    assert evict_all(cache) == [cold, *hot]


def test_without_a_protected_segment_it_is_plain_lru():
    cache = Cache(4, protected_share=0.0)
    a, b, c = chain("x", 3)
    for block_hash in (a, b, c):
        cache.insert(block_hash, None)
    cache.touch([a])
    assert evict_all(cache) == [b, c, a]


def test_pins_hold_a_block_and_thereby_all_that_it_needs():
    cache = Cache(8)
    hashes = chain("a", 3)
    insert(cache, hashes)
    cache.hold(hashes[1])
    cache.hold(hashes[1])
    assert evict_all(cache) == [hashes[2]]
    cache.let_go(hashes[1])
    assert cache.evict() is None
    cache.let_go(hashes[1])
    assert evict_all(cache) == [hashes[1], hashes[0]]


def test_pins_that_hold_everything_cost_the_protected_no_rank():
    cache = Cache(8)
    hot, cold = chain("hot", 2), chain("cold", 2)
    insert(cache, hot)
    insert(cache, cold)
    cache.touch(hot)
    for block_hash in [*hot, *cold]:
        cache.hold(block_hash)
    assert cache.evict() is None
    for block_hash in [*hot, *cold]:
        cache.let_go(block_hash)
    assert all(map(cache.is_protected, hot))
    assert evict_all(cache) == [*cold[::-1], *hot[::-1]]


def test_protected_blocks_beyond_their_share_that_pins_held_go_back_when_room_is_needed():
    cache = Cache(8)
    a, b = chain("a", 8), chain("b", 6)
    insert(cache, a)
    for block_hash in a:
        cache.hold(block_hash)
    cache.touch(a)
    for block_hash in a:
        cache.let_go(block_hash)
    assert cache.segments.num_protected == 8
    for block_hash, parent in zip(b, parents(b), strict=True):
        assert cache.evict(keep=parent) is not None
        cache.insert(block_hash, parent)
    assert [cache.contains(block_hash) for block_hash in [*a, *b]] == [True] * 2 + [False] * 6 + [True] * 6


def test_a_chain_too_long_for_probation_takes_from_the_protected_before_it_takes_from_itself():
    cache = Cache(8)
    a, b = chain("a", 8), chain("b", 8)
    insert(cache, a)
    cache.touch(a)
    for block_hash, parent in zip(b, parents(b), strict=True):
        assert cache.evict(keep=parent) is not None
        cache.insert(block_hash, parent)
    assert all(map(cache.contains, b))
    cache.hold(b[-1])
    assert cache.evict() is None


def test_a_victim_says_whether_it_was_ever_used_again():
    cache = Cache(4, protected_share=0.0)
    a, b = chain("x", 2)
    cache.insert(a, None)
    cache.insert(b, None)
    cache.touch([a])
    first, second = cache.evict(), cache.evict()
    assert (first.block_hash, first.was_reused, second.block_hash, second.was_reused) == (b, False, a, True)
    assert cache.evict() is None


def test_a_block_taken_out_of_the_middle_leaves_both_parts_evictable():
    cache = Cache(8)
    hashes = chain("a", 4)
    insert(cache, hashes)
    cache.touch(hashes)
    assert cache.drop([cache.find(hashes[1]).slot]) == 1
    cache.check_integrity()
    assert sorted(evict_all(cache)) == sorted([hashes[0], *hashes[2:]])


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_false_claim_of_a_circle_makes_nothing_immortal(length):
    cache = Cache(8)
    hashes = chain("a", length)
    for index in range(length):
        cache.insert(hashes[index], hashes[index - 1])  # the first names the last as its parent
    cache.check_integrity()
    cache.touch(hashes)
    assert sorted(evict_all(cache)) == sorted(hashes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cache: setattr(cache.segments, "num_protected", 7), "blocks are protected, counted 7"),
        (lambda cache: cache.segments._num_children.clear(), "children are counted wrongly"),
        (lambda cache: cache.segments._probation.clear(), "is in no heap"),
        (lambda cache: setattr(cache._slots[0], "is_protected", False), "is not protected, and a child"),
    ],
)
def test_damaged_bookkeeping_is_found(damage, message):
    cache = Cache(8)
    insert(cache, chain("a", 3))
    cache.touch(chain("a", 2))
    cache.check_integrity()
    damage(cache)
    with pytest.raises(IntegrityError, match=message):
        cache.check_integrity()


def test_repeated_use_does_not_pile_up_memory():
    cache = Cache(8)
    hashes = chain("a", 4)
    insert(cache, hashes)
    for _ in range(5_000):
        cache.touch(hashes)
        cache.hold(hashes[3])
        cache.let_go(hashes[3])
    assert len(cache.segments._protected) + len(cache.segments._probation) < 200
    cache.check_integrity()


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
