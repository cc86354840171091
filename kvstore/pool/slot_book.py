"""Books which slot holds which block, who refers to it, and which gives way: pool, host tier, store, disk.

Slots and counts only: no bytes, no I/O, no lock; one thread, or whoever holds its owner's lock. A slot is always in one
of these states:

    free        no reference, no block                          taken next
    private     referenced, not findable                        its holders fill it, then publish or release it
    held        referenced, findable by its hash                not given up
    idle        no reference, findable                          taken when no free one is left, as the policy says
    dropped     referenced, found wrong, not findable again     free when its last holder releases it

Every operation is O(1) per block, or O(log n) where the policy is segmented.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvstore.block import BlockHash, Checksum, Proof
from kvstore.errors import IntegrityError
from kvstore.pool.eviction import SegmentedLru, Slot


class CacheEvent(Enum):
    """The events of a findable block. REUSED: its first hit since its publication."""

    PUBLISHED = "published"
    REUSED = "reused"
    EVICTED = "evicted"


class CacheChange(NamedTuple):
    """One event. `parent_hash` is told at publication; None: the first block of a chain, or not known."""

    block_hash: BlockHash
    event: CacheEvent
    parent_hash: BlockHash | None = None


class Block(NamedTuple):
    """The facts of a block that is findable, or is being evicted and still lies in its slot."""

    slot: int
    block_hash: BlockHash
    parent_hash: BlockHash | None
    proof: Proof
    was_reused: bool
    checksum: Checksum | None = None
    """Of its bytes when they were stored, by whom cannot check the proof."""


@dataclass
class BookStats:
    """Counts since the book was made, in blocks."""

    num_evictions: int = 0  # blocks that lost their slot to others
    num_corrupt: int = 0  # blocks that were dropped since their bytes had changed


class SlotBook:
    """Slots 0 .. num_slots - 1. Whoever gets one from the book holds one reference and must release it.

    `protected_share` sizes segmented LRU's protected segment; None: plain LRU, in the order of `release`. `on_change`
    hears each event at once, `on_evict` what one `take` evicts: the content is there during that call alone. Neither
    may call the book.
    """

    def __init__(
        self,
        num_slots: int,
        protected_share: float | None = None,
        *,
        on_change: Callable[[CacheChange], None] | None = None,
        on_evict: Callable[[Sequence[Block]], None] | None = None,
    ) -> None:
        self.stats = BookStats()
        self._tell = on_change or _ignore
        self._on_evict = on_evict
        self._slots: list[Slot] = []
        self._by_hash: dict[BlockHash, Slot] = {}
        # A stack, lowest on top; `release` pushes heads last. So whoever takes several tends to get neighbours in
        # order, and neighbours are one longer run for a transport.
        self._free: list[int] = []
        self._idle: OrderedDict[Slot, None] = OrderedDict()  # least recently released first
        self._segments = None if protected_share is None else SegmentedLru(self._by_hash, protected_share)
        self.extend(num_slots)

    def extend(self, num_slots: int) -> None:
        """Add free slots."""
        first = len(self._slots)
        self._slots += [Slot(first + number) for number in range(num_slots)]
        if self._segments is not None:
            self._segments.resize(len(self._slots))
        self._free[:0] = range(first + num_slots - 1, first - 1, -1)

    # -- what is there --

    def __len__(self) -> int:
        return len(self._by_hash)

    @property
    def num_slots(self) -> int:
        """Number of slots in any state."""
        return len(self._slots)

    @property
    def num_free(self) -> int:
        """Slots that nobody refers to: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_empty(self) -> int:
        """Slots that can be taken without evicting."""
        return len(self._free)

    @property
    def num_private(self) -> int:
        """Slots that are held and cannot be found."""
        return len(self._slots) - len(self._free) - len(self._by_hash)

    def num_references(self, slot_id: int) -> int:
        """Return how many references to the slot are held."""
        return self._slots[slot_id].num_references

    def hash_of(self, slot_id: int) -> BlockHash | None:
        """Return the hash under which the slot can be found, None if it cannot."""
        return self._slots[slot_id].block_hash

    def contains(self, block_hash: BlockHash) -> bool:
        """Whether the block can be found. No use. A hint from any thread."""
        return block_hash in self._by_hash

    def hashes(self) -> list[BlockHash]:
        """All findable blocks, in order of publication. From any thread: one atomic copy of the keys."""
        return list(self._by_hash)

    def peek_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many consecutive blocks from the start can be found. No use. A hint from any thread."""
        num_found = 0
        for block_hash in hashes:
            if block_hash not in self._by_hash:
                break
            num_found += 1
        return num_found

    def find(self, block_hash: BlockHash) -> Block | None:
        """Return what is known of a findable block, None too for one that has no proof yet. No use, no reference."""
        slot = self._by_hash.get(block_hash)
        return describe(slot) if slot is not None and slot.proof is not None else None

    # -- in --

    def take(self, n: int, keep: BlockHash | None = None) -> list[int]:
        """Return up to `n` slots with unknown content and one reference each: free ones, then evicted blocks'.

        Fewer where references hold the rest. `keep`, the block that the new ones are to follow, is not evicted.
        """
        if n < 0:
            raise ValueError(f"cannot take {n} slots")
        slots, num_empty = self._slots, min(n, len(self._free))
        taken = self._free[len(self._free) - num_empty :]
        taken.reverse()
        del self._free[len(self._free) - num_empty :]
        for slot_id in taken:
            slots[slot_id].num_references = 1
        on_evict, evicted = self._on_evict, list[Block]()
        while len(taken) < n and self._idle:
            if self._segments is None:
                slot, _ = self._idle.popitem(last=False)
            else:
                victim = self._segments.evict(keep)
                if victim is None:
                    break
                slot = victim
                del self._idle[slot]
            if on_evict is not None and slot.proof is not None:  # what is not proven is not kept elsewhere
                evicted.append(describe(slot))
            self._unlink(slot)
            slot.num_references = 1
            taken.append(slot.slot_id)
        self.stats.num_evictions += len(taken) - num_empty
        if evicted and on_evict is not None:
            on_evict(evicted)
        return taken

    def publish(
        self,
        slot_id: int,
        block_hash: BlockHash,
        parent_hash: BlockHash | None = None,
        proof: Proof | None = None,
        *,
        checksum: Checksum | None = None,
    ) -> bool:
        """Make a full, verified slot findable, of which the caller holds a reference. It is not written to any more.

        False where that changes nothing: another slot has the block, which stays the findable one, or this one was
        dropped. Raises `IntegrityError` for a slot that nobody refers to, or that is findable under another hash.
        """
        if not 0 <= slot_id < len(self._slots) or self._slots[slot_id].num_references == 0:
            raise self._no_reference(slot_id, "publish")
        slot = self._slots[slot_id]
        if slot.block_hash is not None and slot.block_hash != block_hash:
            raise IntegrityError(f"publish of slot {slot_id} as {block_hash.hex()}: it is {self._name(slot_id)}")
        if block_hash in self._by_hash or slot.is_dropped:
            return False
        slot.block_hash, slot.parent_hash, slot.proof, slot.checksum = block_hash, parent_hash, proof, checksum
        slot.was_reused = False
        self._by_hash[block_hash] = slot
        if self._segments is not None:
            self._segments.insert(slot)
        self._tell(CacheChange(block_hash, CacheEvent.PUBLISHED, parent_hash))
        return True

    # -- references --

    def acquire(self, ids: Sequence[int]) -> None:
        """Take one more reference on each slot. All must be referenced already; `match_prefix` is for idle ones."""
        slots, num_slots = self._slots, len(self._slots)
        for slot_id in ids:
            if not 0 <= slot_id < num_slots or slots[slot_id].num_references == 0:
                raise self._no_reference(slot_id, "acquire")
        for slot_id in ids:
            slots[slot_id].num_references += 1

    def match_prefix(self, hashes: Sequence[BlockHash], is_use: bool = True) -> list[int]:
        """Return the slots of the longest prefix of `hashes` that is here, with one reference taken on each.

        With `is_use` this is a use of each, for the policy.
        """
        return [slot.slot_id for slot in self._match(hashes, is_use)]

    def pin(self, hashes: Sequence[BlockHash], is_use: bool = True) -> list[Block]:
        """Like `match_prefix`, but return all that is known of the blocks."""
        return [describe(slot) for slot in self._match(hashes, is_use)]

    def _match(self, hashes: Sequence[BlockHash], is_use: bool) -> list[Slot]:
        found: list[Slot] = []
        for block_hash in hashes:
            slot = self._by_hash.get(block_hash)
            if slot is None:
                break
            if slot.num_references == 0:
                del self._idle[slot]
            slot.num_references += 1
            if is_use and not slot.was_reused:
                slot.was_reused = True
                self._tell(CacheChange(block_hash, CacheEvent.REUSED))
            found.append(slot)
        if is_use and self._segments is not None:
            self._segments.touch(found)
        return found

    def release(self, ids: Sequence[int]) -> None:
        """Give back one reference on each slot; `ids` in the order of the chain.

        At zero references a findable slot becomes idle and keeps its content, any other becomes free. Tails are
        released before heads, so a chain is evicted from its end and what is left of it stays a usable prefix. Raises
        `IntegrityError` if there is no reference to give back.
        """
        slots, num_slots = self._slots, len(self._slots)
        for slot_id in reversed(ids):
            if not 0 <= slot_id < num_slots or slots[slot_id].num_references == 0:
                raise self._no_reference(slot_id, "release")
            slot = slots[slot_id]
            slot.num_references -= 1
            if slot.num_references:
                continue
            if slot.block_hash is None:
                slot.is_dropped = False
                self._free.append(slot_id)
            else:
                self._idle[slot] = None
                if self._segments is not None:
                    self._segments.idle(slot)

    # -- out --

    def drop(self, ids: Iterable[int]) -> int:
        """Make slots unfindable for good whose bytes have changed; returns how many could be found.

        Whoever refers to one keeps it, and cannot make it findable again.
        """
        num_dropped = 0
        for slot in [self._slots[slot_id] for slot_id in ids]:
            if slot.block_hash is not None:
                self._release_hash(slot)
                slot.is_dropped = slot.num_references > 0
                num_dropped += 1
        self.stats.num_corrupt += num_dropped
        return num_dropped

    # -- soundness --

    def check_integrity(self, expected_references: Mapping[int, int] | None = None) -> None:
        """Raise `IntegrityError`, with the numbers, unless each slot is in one state and each hash has one slot.

        `expected_references` maps slots to the number of references that their holders count; slots left out are
        expected to have none. O(num_slots): for tests, for idle moments and for the debug endpoint.
        """
        problems = self._find_problems()
        if expected_references is not None:
            unknown = [slot_id for slot_id in expected_references if not 0 <= slot_id < self.num_slots]
            problems += [f"slot {slot_id} is referred to and does not exist" for slot_id in unknown]
            problems += [
                f"slot {slot.slot_id} has {slot.num_references} references,"
                f" its holders count {expected_references.get(slot.slot_id, 0)}"
                for slot in self._slots
                if slot.num_references != expected_references.get(slot.slot_id, 0)
            ]
        if problems:
            raise IntegrityError(f"book of {self.num_slots} slots: {len(problems)} problems: {'; '.join(problems[:8])}")

    @property
    def num_references_held(self) -> int:
        """All references together. O(num_slots)."""
        return sum(slot.num_references for slot in self._slots)

    def _find_problems(self) -> list[str]:
        free = Counter(self._free)
        found = {slot.slot_id: slot for slot in self._slots if slot.block_hash is not None}
        problems = [
            f"slot {slot.slot_id} has {slot.num_references} references and is listed {free[slot.slot_id]} times as free"
            for slot in self._slots
            if slot.num_references < 0
            or free[slot.slot_id] != (slot.num_references == 0 and slot.block_hash is None)
            or (slot.is_dropped and (slot.num_references == 0 or slot.block_hash is not None))
        ]
        if {slot_id: slot.block_hash for slot_id, slot in found.items()} != {
            slot.slot_id: block_hash for block_hash, slot in self._by_hash.items()
        }:
            problems.append(f"{len(found)} slots have hashes that do not match the {len(self._by_hash)} in the map")
        idle = {slot for slot in found.values() if slot.num_references == 0}
        if set(self._idle) != idle:
            problems.append(f"{len(idle)} slots are idle, {len(self._idle)} are listed")
        return problems if self._segments is None else problems + self._segments.find_problems(found.values())

    # -- parts of the above --

    def _hold(self, slot: Slot) -> None:
        """Take a reference on a findable slot."""
        if slot.num_references == 0:
            del self._idle[slot]
        slot.num_references += 1

    def _release_hash(self, slot: Slot) -> None:
        """Make a findable slot unfindable, whoever refers to it; free, if nobody does."""
        if slot.num_references == 0:
            del self._idle[slot]
            self._free.append(slot.slot_id)
        if self._segments is not None:
            self._segments.remove(slot)
        self._unlink(slot)

    def _unlink(self, slot: Slot) -> None:
        """Forget what a slot holds, which the policy has forgotten."""
        block_hash = slot.block_hash
        assert block_hash is not None, f"slot {slot.slot_id} is not findable"
        del self._by_hash[block_hash]
        slot.block_hash = slot.proof = slot.checksum = None
        self._tell(CacheChange(block_hash, CacheEvent.EVICTED))

    def _check_referenced(self, slot_id: int, operation: str) -> Slot:
        if not 0 <= slot_id < len(self._slots) or self._slots[slot_id].num_references == 0:
            raise self._no_reference(slot_id, operation)
        return self._slots[slot_id]

    def _no_reference(self, slot_id: int, operation: str) -> IntegrityError:
        return IntegrityError(f"{operation} of slot {slot_id}, to which nobody refers: {self._name(slot_id)}")

    def _name(self, slot_id: int) -> str:
        if not 0 <= slot_id < len(self._slots):
            return f"there are slots 0 .. {len(self._slots) - 1}"
        slot = self._slots[slot_id]
        name = "not findable" if slot.block_hash is None else f"findable as {slot.block_hash.hex()}"
        return f"{slot.num_references} references, {name}"


def _ignore(change: CacheChange) -> None:
    """Tells nobody."""


def describe(slot: Slot) -> Block:
    assert slot.block_hash is not None
    assert slot.proof is not None
    return Block(slot.slot_id, slot.block_hash, slot.parent_hash, slot.proof, slot.was_reused, slot.checksum)
