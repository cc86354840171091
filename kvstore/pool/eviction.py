"""Chooses the slot that a book gives up next: segmented LRU over hash chains. Pure, part of `SlotBook`.

A block enters on *probation*; one that is used again becomes *protected* (Karedla, Love, Wherry 1994,
"Caching Strategies to Improve Disk System Performance"). Victims come from probation, coldest first, so a flood of
blocks that nobody asks for twice flows through probation and leaves the shared prefixes alone. The protected segment
holds a fixed share of the tier; what overflows goes back to the warm end of probation.

Blocks form chains, and a block without its parent is of little use. So two orders hold, always:

    a block is evicted only while no child of it is present      tails go before heads
    a parent is protected if any present child of it is          and so protected prefixes are whole, too

and when a child leaves a segment, its parent there becomes as recent as the child was, in O(1): no parent is colder
than its hottest child. Every operation is O(log n) per block; a use walks up only to the first protected ancestor.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from kvstore.block import BlockHash, Checksum, Proof

# Of 0.1 .. 0.95 the best over Mooncake's conversation trace and synthetic chat. Larger shares lost to plain LRU there:
# a conversation's blocks are used again by its next turn and, once it has ended, are dead weight among the protected.
PROTECTED_SHARE = 0.25


class Slot:
    """A row of the book (`kvstore.pool.slot_book`). Only the book and its policy write to it."""

    __slots__ = (
        "block_hash",
        "checksum",
        "is_dropped",
        "is_protected",
        "last_use",
        "num_references",
        "parent_hash",
        "proof",
        "slot_id",
        "was_reused",
    )

    def __init__(self, slot_id: int) -> None:
        self.slot_id = slot_id
        self.num_references = 0
        self.block_hash: BlockHash | None = None  # None: not findable
        self.parent_hash: BlockHash | None = None
        self.proof: Proof | None = None
        self.checksum: Checksum | None = None  # a store's, which cannot check proofs
        self.was_reused = False  # used at least once after its publication
        self.is_dropped = False
        self.last_use = 0  # the segmented policy's, as is `is_protected`
        self.is_protected = False


class SegmentedLru:
    """The order over hash chains that the head of this module describes. `slots` is the book's map, which we read."""

    def __init__(self, slots: Mapping[BlockHash, Slot], protected_share: float) -> None:
        """`protected_share` of all slots bounds the protected segment; 0 makes this a plain LRU over chains."""
        if not 0.0 <= protected_share <= 1.0:
            raise ValueError(f"expected protected_share in 0 .. 1, not {protected_share}")
        self.max_protected = 0
        self.num_protected = 0
        self._protected_share = protected_share
        self._slots = slots
        # By parent, whether the parent is present or not: a tail may arrive before its head.
        self._num_children: dict[BlockHash, int] = {}
        self._num_protected_children: dict[BlockHash, int] = {}
        # Heaps of (last_use, hash). An entry counts only while `_is_candidate` agrees; stale ones are dropped when met.
        self._probation: list[tuple[int, BlockHash]] = []
        self._protected: list[tuple[int, BlockHash]] = []
        self._tick = 0

    def resize(self, num_slots: int) -> None:
        """Sets the number of slots."""
        self.max_protected = int(num_slots * self._protected_share)

    def insert(self, slot: Slot) -> None:
        """A slot has become findable: on probation, unless a protected child is waiting for it.

        A parent that descends from the block is taken as None: honest hashes cannot do that, and a peer's false claim
        must not make blocks that are never evicted.
        """
        block_hash = _hash(slot)
        if slot.parent_hash is not None and self._descends(slot.parent_hash, block_hash):
            slot.parent_hash = None
        slot.is_protected, slot.last_use = False, self._next_tick()
        if slot.parent_hash is not None:
            self._num_children[slot.parent_hash] = self._num_children.get(slot.parent_hash, 0) + 1
        if block_hash in self._num_protected_children:
            self._protect(block_hash)
            self._shrink_protected()
        else:
            self._push(slot)

    def touch(self, slots: Sequence[Slot]) -> None:
        """Slots, in the order of their chain, were used again."""
        for slot in reversed(slots):  # the head last, so that it is the most recent
            slot.last_use = self._next_tick()
            if slot.is_protected:
                self._push(slot)
            else:
                self._protect(slot.block_hash)
        self._shrink_protected()

    def idle(self, slot: Slot) -> None:
        """The last reference to a findable slot is gone."""
        self._push(slot)

    def evict(self, keep: BlockHash | None = None) -> Slot | None:
        """Forget and return the slot to give up next; None if references leave none.

        `keep`, and with it its ancestors, is not given up: the parent of the block that the room is for.
        """
        kept = self._slots.get(keep) if keep is not None else None
        if kept is None:
            return self._evict()
        kept.num_references += 1
        try:
            return self._evict()
        finally:
            kept.num_references -= 1
            self._push(kept)

    def _evict(self) -> Slot | None:
        self._shrink_protected()  # references may have kept it too large since the last use
        while True:
            slot = self._pop(self._probation, is_protected=False)
            if slot is not None:
                self.remove(slot)
                return slot
            # Probation is empty or held by references: the coldest protected block is the next best.
            slot = self._pop(self._protected, is_protected=True)
            if slot is None:
                return None
            self._demote(slot)

    def remove(self, slot: Slot) -> None:
        """Forget a slot, wherever in its chain."""
        if slot.is_protected:
            self._leave_protected(slot)
        if slot.parent_hash is not None:
            _decrement(self._num_children, slot.parent_hash)
            self._inherit(slot.parent_hash, slot.last_use)

    # -- segments --

    def _protect(self, block_hash: BlockHash | None) -> None:
        """Move a block on probation, and its ancestors up to the first protected one, to the protected segment."""
        while block_hash is not None:
            slot = self._slots.get(block_hash)
            if slot is None or slot.is_protected:
                return
            slot.is_protected = True
            self.num_protected += 1
            if slot.parent_hash is not None:
                children = self._num_protected_children
                children[slot.parent_hash] = children.get(slot.parent_hash, 0) + 1
            self._push(slot)
            block_hash = slot.parent_hash

    def _shrink_protected(self) -> None:
        while self.num_protected > self.max_protected:
            slot = self._pop(self._protected, is_protected=True)
            if slot is None:
                return  # references hold the rest; the next use tries again
            self._demote(slot)

    def _demote(self, slot: Slot) -> None:
        """Move a protected block to the warm end of probation, where it has one more chance."""
        self._leave_protected(slot)
        slot.last_use = self._next_tick()
        self._push(slot)

    def _leave_protected(self, slot: Slot) -> None:
        slot.is_protected = False
        self.num_protected -= 1
        if slot.parent_hash is not None:
            _decrement(self._num_protected_children, slot.parent_hash)
            self._inherit(slot.parent_hash, slot.last_use)

    def _inherit(self, parent_hash: BlockHash, last_use: int) -> None:
        parent = self._slots.get(parent_hash)
        if parent is not None:
            parent.last_use = max(parent.last_use, last_use)
            self._push(parent)

    # -- order --

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    def _is_candidate(self, slot: Slot) -> bool:
        """Whether its segment may give the block up: on probation to be evicted, protected to go on probation."""
        blockers = self._num_protected_children if slot.is_protected else self._num_children
        return slot.num_references == 0 and slot.block_hash not in blockers

    def _push(self, slot: Slot) -> None:
        if not self._is_candidate(slot):
            return
        heap = self._protected if slot.is_protected else self._probation
        if len(heap) > 4 * len(self._slots) + 64:
            heap[:] = self._candidates(self._slots.values(), slot.is_protected)
            heapq.heapify(heap)
        heapq.heappush(heap, (slot.last_use, _hash(slot)))

    def _pop(self, heap: list[tuple[int, BlockHash]], is_protected: bool) -> Slot | None:
        while heap:
            last_use, block_hash = heapq.heappop(heap)
            slot = self._slots.get(block_hash)
            if (
                slot is not None
                and (slot.last_use, slot.is_protected) == (last_use, is_protected)
                and self._is_candidate(slot)
            ):
                return slot
        return None

    def _candidates(self, slots: Iterable[Slot], is_protected: bool) -> list[tuple[int, BlockHash]]:
        return [
            (slot.last_use, _hash(slot))
            for slot in slots
            if slot.is_protected == is_protected and self._is_candidate(slot)
        ]

    def _descends(self, block_hash: BlockHash | None, ancestor: BlockHash) -> bool:
        """Whether `block_hash` is `ancestor` or below it. Only an ancestor with children needs the walk up."""
        if block_hash != ancestor and ancestor not in self._num_children:
            return False
        while block_hash is not None and block_hash != ancestor:
            slot = self._slots.get(block_hash)
            block_hash = slot.parent_hash if slot is not None else None
        return block_hash is not None

    def find_problems(self, slots: Collection[Slot]) -> list[str]:
        """Lists contradictions, given all findable slots, between counters or heaps and the slots."""
        problems: list[str] = []
        children = Counter(slot.parent_hash for slot in slots if slot.parent_hash is not None)
        protected = Counter(slot.parent_hash for slot in slots if slot.parent_hash is not None and slot.is_protected)
        if children != self._num_children or protected != self._num_protected_children:
            problems.append("children are counted wrongly")
        problems += [
            f"block {block_hash.hex()} is not protected, and a child of it is"
            for block_hash in protected
            if block_hash in self._slots and not self._slots[block_hash].is_protected
        ]
        num_protected = sum(slot.is_protected for slot in slots)
        if num_protected != self.num_protected:
            problems.append(f"{num_protected} blocks are protected, counted {self.num_protected}")
        for heap, is_protected in ((self._probation, False), (self._protected, True)):
            missing = set(self._candidates(slots, is_protected)).difference(heap)
            problems += [f"candidate {block_hash.hex()} is in no heap" for _, block_hash in missing]
        return problems


def _hash(slot: Slot) -> BlockHash:
    assert slot.block_hash is not None, f"slot {slot.slot_id} is not findable"
    return slot.block_hash


def _decrement(counts: dict[BlockHash, int], key: BlockHash) -> None:
    counts[key] -= 1
    if counts[key] == 0:
        del counts[key]
