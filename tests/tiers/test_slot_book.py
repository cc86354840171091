"""The slot book as stores use it: slots in one state each, references that hold, and whom an eviction is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockHash, HostMemory
from kvstore.errors import IntegrityError
from kvstore.pool import PROTECTED_SHARE
from kvstore.pool.slot_book import (
    Block,
    CacheChange,
    CacheEvent,
    SlotBook,
)
from tests.proofs import prove
from tests.tiers.blocks import BLOCK_BYTES, chain, named_hash, parents, payload, proof


def make_book(num_slots: int = 8, **callbacks) -> SlotBook:
    return SlotBook(num_slots, PROTECTED_SHARE, **callbacks)


def insert(book: SlotBook, hashes: list[BlockHash]) -> list[int]:
    slots = book.take(len(hashes))
    for slot, block_hash, parent in zip(slots, hashes, parents(hashes), strict=True):
        assert book.publish(slot, block_hash, parent, proof(block_hash))
    book.release(slots)
    return slots


def test_a_block_is_found_once_published_and_not_before():
    book = make_book()
    a = chain("a", 3)
    slots = book.take(3)
    assert (slots, book.peek_prefix(a), book.num_private, book.num_empty) == ([0, 1, 2], 0, 3, 5)
    for slot, block_hash, parent in zip(slots, a, parents(a), strict=True):
        assert book.publish(slot, block_hash, parent, proof(block_hash))
    assert (book.peek_prefix(a), book.num_private, book.num_free) == (3, 0, 5), "held"
    book.release(slots)
    assert (len(book), book.num_empty, book.num_free) == (3, 5, 8)
    assert book.find(a[1]) == Block(1, a[1], a[0], proof(a[1]), was_reused=False)
    assert (book.find(named_hash("absent")), book.hashes()) == (None, a)


def test_a_pin_covers_the_consecutive_prefix_and_is_a_use_if_so_said():
    book = make_book()
    a = chain("a", 3)
    insert(book, a)
    assert [block.slot for block in book.pin([*a[:2], named_hash("absent"), a[2]])] == [0, 1]
    book.pin(a[2:], is_use=False)
    assert [book.find(each).was_reused for each in a] == [True, True, False]
    book.check_integrity({0: 1, 1: 1, 2: 1})


def test_held_blocks_are_never_evicted_and_whoever_wants_room_gets_less():
    book = make_book(4)
    b = chain("b", 2)
    insert(book, chain("a", 2))
    insert(book, b)
    held = book.match_prefix(b)
    taken = book.take(4)
    assert (sorted(taken), book.peek_prefix(b), book.peek_prefix(chain("a", 2))) == ([0, 1], 2, 0)
    book.release(taken)
    book.check_integrity(dict.fromkeys(held, 1))


def test_a_block_is_not_evicted_for_its_own_tail():
    book = make_book(2)
    a = chain("a", 2)
    insert(book, a)
    assert book.take(2, keep=a[0]) == [1]


def test_the_same_block_published_twice_keeps_the_first():
    book = make_book()
    (a,) = chain("a", 1)
    insert(book, [a])
    (slot,) = book.take(1)
    assert not book.publish(slot, a, None, proof(a))
    book.release([slot])
    assert (len(book), book.num_empty, book.find(a).slot) == (1, 7, 0)
    book.check_integrity({})


def test_a_dropped_block_is_gone_for_new_readers_and_stays_for_those_who_read():
    book = make_book(2)
    (a,) = chain("a", 1)
    (slot,) = insert(book, [a])
    book.acquire(book.match_prefix([a]))
    assert (book.drop([slot]), book.drop([slot]), book.contains(a), book.num_empty) == (1, 0, False, 1)
    assert not book.publish(slot, a, None, proof(a)), "not by those who hold what is wrong"
    (other,) = insert(book, [a])
    assert other != slot, "a right one may come meanwhile"
    book.release([slot])
    book.check_integrity({slot: 1})
    book.release([slot])
    assert (book.num_empty, book.stats.num_corrupt) == (1, 1)
    book.check_integrity({})


def test_a_book_grows_and_what_is_protected_with_it():
    book = SlotBook(0, 0.5)
    assert book.take(1) == []
    book.extend(2)
    insert(book, chain("a", 2))
    book.extend(2)
    insert(book, chain("b", 2))
    assert book._segments.max_protected == 2
    assert sorted(book.take(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda book: book._segments.remove(book._slots[1]), "children are counted wrongly"),
        (lambda book: book._idle.popitem(), "2 slots are idle, 1 are listed"),
        (lambda book: setattr(book._slots[5], "is_dropped", True), "slot 5 has 0 references"),
    ],
)
def test_damaged_bookkeeping_is_found(damage, message):
    book = make_book()
    insert(book, chain("a", 2))
    book.check_integrity({})
    damage(book)
    with pytest.raises(IntegrityError, match=message):
        book.check_integrity({})


CHAINS = [chain("a", 4), chain("a", 2) + chain("b", 3), chain("c", 5)]
NUM_SLOTS = 6


class SlotBookMachine(RuleBasedStateMachine):
    """Against a dict: what is found has its right bytes, what is held stays, all that is evicted is told before."""

    @initialize(protected_share=st.sampled_from([None, 0.0, 0.25, 1.0]))
    def start(self, protected_share: float | None) -> None:
        self.memory = HostMemory.allocate(NUM_SLOTS, BLOCK_BYTES)
        self.book = SlotBook(NUM_SLOTS, protected_share, on_evict=self.evicted, on_change=self.changed)
        self.present: set[BlockHash] = set()
        self.private: list[int] = []
        self.pins: list[Block] = []

    def evicted(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            assert block.block_hash not in {pin.block_hash for pin in self.pins}
            assert self.memory.view(block.slot).tobytes() == payload(block.block_hash).tobytes()

    def changed(self, change: CacheChange) -> None:
        assert (change.block_hash in self.present) == (change.event is not CacheEvent.PUBLISHED)
        if change.event is CacheEvent.PUBLISHED:
            self.present.add(change.block_hash)
        elif change.event is CacheEvent.EVICTED:
            self.present.remove(change.block_hash)

    @rule(num_blocks=st.integers(0, 4))
    def take(self, num_blocks: int) -> None:
        num_free = self.book.num_free
        slots = self.book.take(num_blocks)
        assert {pin.slot for pin in self.pins}.union(self.private).isdisjoint(slots)
        assert len(set(slots)) == len(slots) <= num_blocks
        assert len(slots) == num_blocks or self.pins or num_free < num_blocks
        self.private += slots
        for slot in slots:
            self.memory.view(slot)[:] = 0xEE

    @precondition(lambda self: self.private)
    @rule(prompt=st.sampled_from(CHAINS), index=st.integers(0, 4))
    def publish(self, prompt: list[BlockHash], index: int) -> None:
        slot = self.private.pop()
        index = min(index, len(prompt) - 1)
        block_hash = prompt[index]
        self.memory.view(slot)[:] = payload(block_hash)
        is_known = block_hash in self.present
        assert self.book.publish(slot, block_hash, parents(prompt)[index], proof(block_hash)) == (not is_known)
        self.book.release([slot])

    @precondition(lambda self: self.private)
    @rule()
    def abandon(self) -> None:
        self.book.release([self.private.pop()])

    @rule(prompt=st.sampled_from(CHAINS), is_use=st.booleans())
    def pin(self, prompt: list[BlockHash], is_use: bool) -> None:
        length = self.book.peek_prefix(prompt)
        pinned = self.book.pin(prompt, is_use)
        assert [block.block_hash for block in pinned] == prompt[:length]
        self.pins += pinned

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.book.release([self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))).slot])

    @rule(prompt=st.sampled_from(CHAINS), index=st.integers(0, 4))
    def drop(self, prompt: list[BlockHash], index: int) -> None:
        block = self.book.find(prompt[min(index, len(prompt) - 1)])
        if block is not None:
            assert self.book.drop([block.slot]) == 1

    @rule()
    def drop_all(self) -> None:
        num_present = len(self.present)
        assert self.book.drop(range(self.book.num_slots)) == num_present

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "book"):
            return
        self.book.check_integrity(Counter([*(pin.slot for pin in self.pins), *self.private]))
        assert set(self.book.hashes()) == self.present
        for pin in self.pins:
            assert self.memory.view(pin.slot).tobytes() == payload(pin.block_hash).tobytes()
        for block_hash in self.present:
            found = self.book.find(block_hash)
            assert prove(self.memory, [found.slot], [block_hash]) == [found.proof] == [proof(block_hash)]


TestSlotBookAgainstADict = SlotBookMachine.TestCase
TestSlotBookAgainstADict.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
