"""The host tier by itself: what the paged pool evicts is there until it is needed, and comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.block import BlockHash
from kvstore.errors import IntegrityError
from kvstore.pool.slot_book import CacheChange, CacheEvent
from tests.host_tier.paged_pool import PagedPool
from tests.tiers.blocks import chain, parents


def test_an_evicted_block_is_found_and_comes_back_whole() -> None:
    world = PagedPool(num_blocks=4, num_slots=8)
    a = chain("a", 3)
    world.cache(a)
    world.evict_all()
    assert world.tier.may_have(a[0])
    assert set(world.tier.hashes()) == set(a)
    assert len(world.pool) == 0
    assert world.bring_back(a) == 3
    assert world.pool.peek_prefix(a) == 3
    world.check_content(a)
    assert set(world.tier.hashes()) == set(a), "they stay"
    stats = world.tier.stats
    assert (stats.num_offloaded, stats.num_restored, stats.num_corrupt, stats.num_lost) == (3, 3, 0, 0)
    world.check_integrity()


def test_an_eviction_of_what_is_here_already_copies_nothing() -> None:
    world = PagedPool(num_blocks=4, num_slots=8)
    a = chain("a", 4)
    for _ in range(2):
        world.cache(a)
        world.evict_all()
    assert world.tier.stats.num_offloaded == 4
    world.check_integrity()


def test_changes_tell_what_came_and_what_went() -> None:
    world = PagedPool(num_blocks=2, num_slots=2)
    a, b = chain("a", 1), chain("b", 2)
    world.cache(a)
    world.evict_all()
    assert world.tier.take_changes() == [CacheChange(a[0], CacheEvent.PUBLISHED)]
    for block_hash, parent in zip(b, parents(b), strict=True):
        world.cache([block_hash], parent)
        world.evict_all()
    changes = world.tier.take_changes()
    assert [(change.block_hash, change.event) for change in changes if change.event is not CacheEvent.REUSED] == [
        (b[0], CacheEvent.PUBLISHED),
        (a[0], CacheEvent.EVICTED),
        (b[1], CacheEvent.PUBLISHED),
    ]
    assert world.tier.state()["num_evicted"] == 1


def test_the_least_recently_used_one_off_gives_way_and_what_came_back_once_stays() -> None:
    world = PagedPool(num_blocks=8, num_slots=4)
    shared = chain("shared", 1)
    world.cache(shared)
    world.evict_all()
    assert world.bring_back(shared) == 1
    world.evict_all()
    for index in range(20):
        world.cache(chain(f"one-off {index}", 1))
        world.evict_all()
    assert shared[0] in world.tier.hashes()
    assert world.tier.state()["num_blocks"] == 4


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_flipped_byte_costs_the_blocks_from_there_on_and_is_dropped(wrong: int) -> None:
    world = PagedPool(num_blocks=4, num_slots=8)
    a = chain("a", 3)
    world.cache(a)
    world.evict_all()
    world.flip_byte(a[wrong])
    assert world.bring_back(a) == wrong
    assert world.pool.peek_prefix(a) == wrong
    world.check_content(a[:wrong])
    assert set(world.tier.hashes()) == {each for each in a if each != a[wrong]}
    assert world.tier.stats.num_corrupt == 1
    world.check_integrity()


def test_a_flood_leaves_half_of_the_tier_alone_and_is_counted() -> None:
    world = PagedPool(num_blocks=12, num_slots=8)
    old = chain("old", 4)
    world.cache(old)
    world.evict_all()
    flood = chain("flood", 12)
    world.cache(flood)
    world.evict_all()
    assert world.tier.stats.num_lost == 8
    found = set(world.tier.hashes())
    assert found == {*old, *flood[:4]}, "of the flood, the head"
    world.check_integrity()


def test_pinned_blocks_are_not_given_up_for_new_ones() -> None:
    world = PagedPool(num_blocks=4, num_slots=2)
    a, b = chain("a", 2), chain("b", 2)
    for block_hash, parent in zip(a, parents(a), strict=True):
        world.cache([block_hash], parent)
        world.evict_all()
    pinned = world.tier.pin(a)
    assert len(pinned) == 2
    world.cache(b)
    world.evict_all()
    assert set(world.tier.hashes()) == set(a)
    assert world.tier.stats.num_lost == 2
    world.tier.unpin(pinned)
    world.check_integrity()


def test_a_byte_that_changed_before_the_eviction_is_seen_on_the_way_back() -> None:
    world = PagedPool(num_blocks=4, num_slots=8)
    a = chain("a", 3)
    world.cache(a)
    (wrong, *_) = world.pool.match_prefix(a[1:2])
    world.memory.view(wrong)[9] ^= 1
    world.pool.release([wrong])
    world.evict_all()
    assert world.bring_back(a) == 1
    assert world.tier.stats.num_corrupt == 1
    world.check_integrity()


def test_integrity_sees_a_lost_pin_and_sizes_must_fit() -> None:
    world = PagedPool(num_blocks=4, num_slots=4)
    a = chain("a", 1)
    world.cache(a)
    world.evict_all()
    (pinned,) = world.tier.pin(a)
    world.tier._book.release([pinned.slot])
    with pytest.raises(IntegrityError, match="pins"):
        world.check_integrity()
    with pytest.raises(ValueError, match="slots of"):
        PagedPool(num_blocks=1, num_slots=1, slot_bytes=64)


def test_the_state_says_what_is_where() -> None:
    world = PagedPool(num_blocks=4, num_slots=4)
    a = chain("a", 2)
    world.cache(a)
    world.evict_all()
    assert world.bring_back([BlockHash(bytes(16))]) == 0
    state = world.tier.state()
    assert (state["num_slots"], state["num_blocks"], state["num_pins"]) == (4, 2, 0)
    assert (state["num_offloaded"], state["num_restored"]) == (2, 0)
    assert np.isfinite(float(str(state["offload_s"])))
