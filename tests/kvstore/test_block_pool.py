"""The block pool: who holds what, who is evicted first, and that nothing is ever lost or given twice."""

from __future__ import annotations

import pytest

from kvstore.block import BlockHash
from kvstore.errors import IntegrityError, OutOfBlocks
from kvstore.pool import BlockPool
from kvstore.pool.slot_book import Block, CacheChange, CacheEvent


def chain(name: str, length: int) -> list[BlockHash]:
    return [BlockHash(f"{name}{i}".encode().ljust(16, b".")) for i in range(length)]


def cached_chain(pool: BlockPool, hashes: list[BlockHash]) -> list[int]:
    """Compute, publish and release a request of `len(hashes)` blocks."""
    ids = pool.allocate(len(hashes))
    for block_id, block_hash, parent_hash in zip(ids, hashes, [None, *hashes[:-1]], strict=True):
        pool.publish(block_id, block_hash, parent_hash)
    pool.release(ids)
    return ids


def test_a_fresh_pool_gives_neighbouring_blocks_in_order_and_takes_them_back():
    pool = BlockPool(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert (pool.num_free, len(pool)) == (5, 0)
    pool.release([0, 1, 2])
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.check_integrity({0: 1, 1: 1, 2: 1, 3: 1})


def test_an_allocation_beyond_what_is_free_takes_nothing_and_says_the_numbers():
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks requested, 1 of 4 are free or evictable"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.allocate(0) == []


def test_released_blocks_stay_findable_until_they_are_needed():
    pool = BlockPool(4)
    hashes = chain("a", 3)
    ids = cached_chain(pool, hashes)
    assert (pool.num_free, len(pool)) == (4, 3)
    assert pool.peek_prefix(hashes) == 3
    assert pool.match_prefix(hashes) == ids
    pool.check_integrity(dict.fromkeys(ids, 1))


def test_a_match_ends_at_the_first_block_that_is_missing():
    pool = BlockPool(8)
    a, b = chain("a", 3), chain("b", 3)
    ids = cached_chain(pool, a)
    assert pool.match_prefix([a[0], b[1], a[2]]) == ids[:1]
    assert pool.peek_prefix(b) == 0
    pool.check_integrity({ids[0]: 1})


def test_free_blocks_are_used_before_cached_ones_are_evicted():
    pool = BlockPool(4)
    hashes = chain("a", 2)
    ids = cached_chain(pool, hashes)
    assert set(pool.allocate(2)).isdisjoint(ids)
    assert pool.peek_prefix(hashes) == 2
    assert pool.stats.num_evictions == 0


def test_chains_are_evicted_from_their_end_and_the_least_recently_used_first():
    pool = BlockPool(6)
    a, b = chain("a", 3), chain("b", 3)
    cached_chain(pool, a)
    cached_chain(pool, b)
    pool.allocate(1)
    assert (pool.peek_prefix(a), pool.peek_prefix(b)) == (2, 3)
    pool.release(pool.match_prefix(a))  # now b is the older one
    pool.allocate(2)
    assert (pool.peek_prefix(a), pool.peek_prefix(b)) == (2, 1)
    assert pool.stats.num_evictions == 3


def test_a_block_with_several_holders_stays_until_the_last_lets_go():
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    pool.acquire([block_id])
    pool.release([block_id])
    assert pool.num_references(block_id) == 1
    assert pool.num_free == 1
    pool.release([block_id])
    assert pool.num_free == 2


def test_the_same_block_twice_in_one_list_counts_twice():
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    pool.acquire([block_id, block_id])
    pool.check_integrity({block_id: 3})
    pool.release([block_id, block_id, block_id])
    pool.check_integrity({})


def test_publishing_what_is_cached_already_leaves_the_first_block_findable():
    pool = BlockPool(4)
    (block_hash,) = chain("a", 1)
    first, second = pool.allocate(2)
    pool.publish(first, block_hash)
    pool.publish(second, block_hash)
    pool.publish(first, block_hash)
    assert (pool.hash_of(first), pool.hash_of(second), len(pool)) == (block_hash, None, 1)
    pool.release([first, second])
    assert pool.match_prefix([block_hash]) == [first]
    pool.check_integrity({first: 1})


def test_a_block_cannot_change_its_hash_nor_be_published_by_nobody():
    pool = BlockPool(4)
    a, b = chain("a", 2)
    (block_id,) = pool.allocate(1)
    pool.publish(block_id, a)
    with pytest.raises(IntegrityError, match=f"publish of slot {block_id}"):
        pool.publish(block_id, b)
    pool.release([block_id])
    with pytest.raises(IntegrityError, match="nobody refers"):
        pool.publish(block_id, a)


def test_writing_an_unshared_unfindable_block_needs_no_copy():
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    assert pool.make_writable(block_id) == (block_id, None)
    pool.check_integrity({block_id: 1})


def test_writing_a_shared_block_copies_it_and_leaves_the_other_holder_alone():
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    pool.acquire([block_id])
    copy, source = pool.make_writable(block_id)
    assert source == block_id
    assert copy != block_id
    pool.check_integrity({block_id: 1, copy: 1})


def test_writing_a_findable_block_copies_it_and_keeps_it_findable():
    pool = BlockPool(2)
    (block_hash,) = chain("a", 1)
    (block_id,) = pool.allocate(1)
    pool.publish(block_id, block_hash)
    copy, source = pool.make_writable(block_id)
    assert (source, pool.hash_of(copy)) == (block_id, None)
    assert pool.peek_prefix([block_hash]) == 1
    pool.check_integrity({copy: 1})


def test_in_a_full_pool_a_sole_holder_writes_in_place_and_the_block_is_no_longer_findable():
    pool = BlockPool(1)
    (block_hash,) = chain("a", 1)
    (block_id,) = pool.allocate(1)
    pool.publish(block_id, block_hash)
    assert pool.make_writable(block_id) == (block_id, None)
    assert pool.peek_prefix([block_hash]) == 0
    assert pool.stats.num_evictions == 1
    pool.check_integrity({block_id: 1})


def test_in_a_full_pool_a_shared_block_cannot_be_made_writable():
    pool = BlockPool(1)
    (block_id,) = pool.allocate(1)
    pool.acquire([block_id])
    with pytest.raises(OutOfBlocks):
        pool.make_writable(block_id)
    pool.check_integrity({block_id: 2})


def test_dropping_all_blocks_forgets_hashes_and_keeps_references():
    pool = BlockPool(6)
    a, b = chain("a", 2), chain("b", 2)
    cached_chain(pool, a)
    held = pool.match_prefix(a[:1])
    cached_chain(pool, b)
    assert pool.drop(range(6)) == 4
    assert (len(pool), pool.num_free, pool.peek_prefix(a), pool.peek_prefix(b)) == (0, 5, 0, 0)
    pool.check_integrity({held[0]: 1})
    pool.release(held)
    assert pool.num_free == 6


def test_without_prefix_caching_nothing_is_ever_findable():
    pool = BlockPool(4, enable_prefix_caching=False)
    hashes = chain("a", 2)
    cached_chain(pool, hashes)
    assert (len(pool), pool.match_prefix(hashes), pool.peek_prefix(hashes)) == (0, [], 0)
    pool.check_integrity({})


@pytest.mark.parametrize("block_id", [0, -1, 2])
def test_giving_back_what_nobody_holds_is_refused(block_id):
    pool = BlockPool(2)
    with pytest.raises(IntegrityError, match=f"release of slot {block_id}"):
        pool.release([block_id])
    with pytest.raises(IntegrityError, match=f"acquire of slot {block_id}"):
        pool.acquire([block_id])
    with pytest.raises(IntegrityError, match=f"make_writable of slot {block_id}"):
        pool.make_writable(block_id)
    pool.check_integrity({})


def test_a_leaked_and_an_unknown_reference_are_reported_with_the_numbers():
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(IntegrityError, match="slot 0 has 1 references, its holders count 0"):
        pool.check_integrity({})
    with pytest.raises(IntegrityError, match="slot 9 is referred to and does not exist"):
        pool.check_integrity({0: 1, 9: 1})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool._free.append(3), "slot 3 has 0 references and is listed 2 times as free"),
        (lambda pool: pool._free.remove(3), "slot 3 has 0 references and is listed 0 times as free"),
        (lambda pool: setattr(pool._slots[1], "num_references", 0), "slot 1 has 0 references and is listed 0 times"),
        (lambda pool: pool._by_hash.clear(), "1 slots have hashes"),
        (lambda pool: pool._by_hash.__setitem__(b"x", pool._slots[1]), "1 slots have hashes"),
        (lambda pool: setattr(pool._slots[3], "block_hash", b"x"), "slot 3 has 0 references and is listed 1 times"),
        (lambda pool: setattr(pool._slots[0], "block_hash", None), "slot 0 has 0 references and is listed 0 times"),
        (lambda pool: pool._idle.clear(), "1 slots are idle, 0 are listed"),
    ],
)
def test_damaged_bookkeeping_is_found(damage, message):
    pool = BlockPool(5)
    cached_chain(pool, chain("a", 1))
    assert pool.allocate(1) == [1]
    pool.check_integrity({1: 1})
    damage(pool)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity()


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
    with pytest.raises(ValueError, match="cannot take -1"):
        BlockPool(1).allocate(-1)


def test_changes_tell_in_order_what_became_findable_and_what_was_evicted():
    pool = BlockPool(3)
    first, second = chain("first", 2), chain("second", 2)
    cached_chain(pool, first)
    assert pool.take_changes() == [published(first[0]), published(first[1], after=first[0])]
    cached_chain(pool, second)  # one free block is left: the end of the first chain goes
    assert pool.take_changes() == [
        CacheChange(first[1], CacheEvent.EVICTED),
        published(second[0]),
        published(second[1], after=second[0]),
    ]
    assert sorted(pool.hashes()) == sorted([first[0], *second])
    pool.drop(range(pool.num_blocks))
    changes = pool.take_changes()
    assert {change.event for change in changes} == {CacheEvent.EVICTED}
    assert sorted(change.block_hash for change in changes) == sorted([first[0], *second])
    assert pool.take_changes() == []


def published(block_hash: BlockHash, after: BlockHash | None = None) -> CacheChange:
    return CacheChange(block_hash, CacheEvent.PUBLISHED, after)


def test_the_first_hit_of_a_block_since_its_publication_is_told_once():
    pool = BlockPool(2)
    hashes = chain("shared", 2)
    cached_chain(pool, hashes)
    pool.take_changes()
    pool.release(pool.match_prefix(hashes[:1]))
    pool.release(pool.match_prefix(hashes))
    pool.release(pool.match_prefix(hashes))
    assert pool.take_changes() == [CacheChange(each, CacheEvent.REUSED) for each in hashes]


def test_a_block_published_without_a_proof_gets_one_once_and_keeps_it_while_it_can_be_found():
    pool = BlockPool(2)
    first, second = cached_chain(pool, chain("a", 2))
    assert pool.take_unproven() == dict(zip([first, second], chain("a", 2), strict=True))
    assert (pool.take_unproven(), pool.find(chain("a", 1)[0])) == ({}, None)
    pool.set_proofs([first, second], [11, 12])
    assert pool.proofs([first, second]) == [11, 12]
    assert pool.find(chain("a", 2)[1]) == Block(second, *reversed(chain("a", 2)), 12, False)
    (again,) = pool.allocate(1)
    assert pool.proofs([again]) == [None], "evicted"
    pool.publish(again, *chain("b", 1), proof=13)
    pool.publish(again, *chain("b", 1), proof=14)
    assert (pool.proofs([again]), pool.take_unproven()) == ([13], {}), "the first word counts"
    pool.drop(range(pool.num_blocks))
    pool.publish(again, *chain("c", 1))
    assert pool.proofs([again]) == [None]


def test_an_evicted_block_takes_its_proof_along_and_one_without_goes_nowhere():
    evicted = []
    pool = BlockPool(2, on_evict=evicted.extend)
    ids = cached_chain(pool, chain("a", 2))
    pool.set_proofs(ids[:1], [11])
    pool.allocate(2)
    assert [(block.block_hash, block.proof) for block in evicted] == [(chain("a", 1)[0], 11)]


def test_a_block_that_has_changed_is_found_no_more_and_offered_to_nobody():
    evicted = []
    pool = BlockPool(4, on_evict=evicted.extend)
    hashes = chain("a", 3)
    ids = cached_chain(pool, hashes)
    pool.take_changes()
    pool.set_proofs(ids, [11, 12, 13])
    held = pool.match_prefix(hashes)
    assert pool.drop([ids[1]]) == 1
    assert pool.drop([ids[1]]) == 0
    pool.publish(ids[1], hashes[1], hashes[0])
    assert CacheChange(hashes[1], CacheEvent.EVICTED) in pool.take_changes()
    assert (pool.peek_prefix(hashes), pool.stats.num_corrupt) == (1, 1)
    pool.release(held)
    pool.check_integrity({})
    pool.allocate(4)
    assert [block.block_hash for block in evicted] == [hashes[2], hashes[0]], "what has changed goes nowhere"
    pool.publish(ids[1], hashes[1], hashes[0])
    assert pool.peek_prefix(hashes[1:]) == 1, "other content now"


def test_a_block_that_has_changed_and_that_nobody_holds_is_free_at_once():
    pool = BlockPool(2)
    ids = cached_chain(pool, chain("a", 2))
    assert pool.drop(ids[:1]) == 1
    assert (pool.num_free, len(pool)) == (2, 1)
    pool.check_integrity({})
