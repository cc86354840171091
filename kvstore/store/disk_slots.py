"""Which slot of the disk tier holds what: bookkeeping only, no I/O and no lock (`kvstore.store.disk_tier` holds one).

A slot is always in exactly one of four states:

    free      nothing in it that counts
    claimed   one thread writes it; not findable yet
    stored    findable, readable by any number of threads
    doomed    dropped, not findable any more, until the last read of it has ended
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvstore.block import BlockHash, Proof
from kvstore.errors import IntegrityError
from kvstore.pool import SegmentedLru


class Place(NamedTuple):
    """A slot of a segment."""

    segment_id: int
    slot: int


class Entry(NamedTuple):
    """A stored block."""

    place: Place
    parent_hash: BlockHash | None
    proof: Proof


class Claim(NamedTuple):
    """A slot to write, and the block that lost it, if any."""

    place: Place
    evicted: BlockHash | None


class SlotTable:
    """The slots of all segments."""

    def __init__(self, capacity: int, protected_share: float) -> None:
        self.stored: dict[BlockHash, Entry] = {}
        self._policy = SegmentedLru(capacity, protected_share)
        self._claimed: dict[BlockHash, Place] = {}
        self._doomed: dict[BlockHash, Place] = {}
        self._free: list[Place] = []

    @property
    def num_free(self) -> int:
        """Number of slots that can be claimed without evicting."""
        return len(self._free)

    def add_free(self, segment_id: int, slots: Iterable[int]) -> None:
        """Take over slots that hold nothing. They are given out lowest first, so that chains tend to lie in order."""
        self._free += [Place(segment_id, slot) for slot in sorted(slots, reverse=True)]

    def add_stored(self, block_hash: BlockHash, entry: Entry) -> None:
        """Take over a slot that holds a block."""
        self._policy.insert(block_hash, entry.parent_hash)
        self.stored[block_hash] = entry

    def is_known(self, block_hash: BlockHash) -> bool:
        """Whether the block is stored, being written, or doomed and not yet gone: none of these can be claimed."""
        return block_hash in self._policy or block_hash in self._claimed

    def claim(self, block_hash: BlockHash, parent_hash: BlockHash | None, may_evict: bool) -> Claim | None:
        """Return a slot for a block that is not known; None where none is free and none may be, or can be, evicted."""
        evicted = None
        if self._free:
            place = self._free.pop()
        else:
            victim = self._policy.evict(keep=parent_hash) if may_evict else None
            if victim is None:
                return None
            evicted = victim.block_hash
            place = self.stored.pop(evicted).place
        self._claimed[block_hash] = place
        return Claim(place, evicted)

    def finish_claim(self, block_hash: BlockHash, parent_hash: BlockHash | None, proof: Proof) -> None:
        """Make a claimed block findable: it is written."""
        self.add_stored(block_hash, Entry(self._claimed.pop(block_hash), parent_hash, proof))

    def undo_claim(self, block_hash: BlockHash) -> None:
        """Free a claimed slot: it could not be written."""
        self._free.append(self._claimed.pop(block_hash))

    def pin(self, block_hash: BlockHash) -> Entry | None:
        """Keep a stored block's slot as it is until `unpin`; None if it is not stored."""
        entry = self.stored.get(block_hash)
        if entry is not None:
            self._policy.pin(block_hash)
        return entry

    def unpin(self, block_hash: BlockHash) -> None:
        """Undo one `pin`; frees the slot of a doomed block with the last one."""
        self._policy.unpin(block_hash)
        if block_hash in self._doomed and self._policy.num_pins(block_hash) == 0:
            self._policy.remove(block_hash)
            self._free.append(self._doomed.pop(block_hash))

    def touch(self, block_hash: BlockHash) -> None:
        """Note a use of a block, if it is still stored."""
        if block_hash in self.stored:
            self._policy.touch([block_hash])

    def doom(self, block_hash: BlockHash) -> Place | None:
        """Make a block that the caller has pinned unfindable; None if it is so already."""
        entry = self.stored.pop(block_hash, None)
        if entry is None:
            return None
        self._doomed[block_hash] = entry.place
        return entry.place

    def check_integrity(self, slots: Iterable[Place]) -> None:
        """Raise `IntegrityError` unless each of `slots` is in one state, the policy agrees and nothing is under way."""
        self._policy.check_integrity()
        problems: list[str] = []
        every = sorted(slots)
        stored = [entry.place for entry in self.stored.values()]
        if sorted([*stored, *self._free, *self._doomed.values(), *self._claimed.values()]) != every:
            problems.append(f"{len(stored)} stored + {len(self._free)} free of {len(every)} slots")
        if self._claimed or self._doomed:
            problems.append(f"{len(self._claimed)} slots are claimed, {len(self._doomed)} doomed")
        if len(self._policy) != len(self.stored) or any(block_hash not in self._policy for block_hash in self.stored):
            problems.append(f"the policy knows {len(self._policy)} blocks of {len(self.stored)}")
        elif any(self._policy.num_pins(block_hash) for block_hash in self.stored):
            problems.append("a block is pinned")
        if problems:
            raise IntegrityError(f"disk tier: {'; '.join(problems)}")
