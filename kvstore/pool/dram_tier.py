"""The memory tier: one pool of blocks in main memory, found by hash, lent by pins, given up by segmented LRU.

A worker's host-memory tier and a store node's DRAM are this. The pool's `HostMemory` is what transports read from and
write into; this module counts slots and moves no bytes. It belongs to one thread (its event loop) and takes no lock.

A slot is always in exactly one of three states:

    free        nobody's
    private     the caller's, who fills it, then publishes or abandons it
    published   findable by its hash, or dropped while pinned and on its way to `free`; the tier's
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.block import BlockHash, HostMemory, Proof
from kvstore.errors import DoubleFree, IntegrityError
from kvstore.pool.eviction import DEFAULT_PROTECTED_SHARE, SegmentedLru


class PinnedBlock(NamedTuple):
    """A published block that stays where it is until `unpin`: what a lease announces."""

    slot: int
    block_hash: BlockHash
    proof: Proof


class ResidentBlock(NamedTuple):
    """All that is known of a published block, or of one that was just evicted and still lies in its slot."""

    slot: int
    block_hash: BlockHash
    parent_hash: BlockHash | None
    proof: Proof
    was_reused: bool


@dataclass
class DramStats:
    """Counts since the tier was made, in blocks."""

    num_queried: int = 0  # hashes given to pin
    num_hits: int = 0  # of these, pinned
    num_published: int = 0
    num_evicted: int = 0
    num_dropped: int = 0


class _Published(NamedTuple):
    slot: int
    parent_hash: BlockHash | None
    proof: Proof


class DramTier:
    """Slots 0 .. memory.num_blocks - 1.

    `on_evict` is called with each block that `begin_insert` evicts, before its slot is given to anybody: the bytes are
    still there, and only during the call. `on_change(block_hash, is_present)` is called when a block has become
    findable, or has ceased to be: for an index. Neither may call the tier.
    """

    def __init__(
        self,
        memory: HostMemory,
        on_evict: Callable[[ResidentBlock], None] | None = None,
        on_change: Callable[[BlockHash, bool], None] | None = None,
        protected_share: float = DEFAULT_PROTECTED_SHARE,
    ) -> None:
        self.memory = memory
        self.stats = DramStats()
        self._on_evict = on_evict
        self._on_change = on_change
        self._policy = SegmentedLru(memory.num_blocks, protected_share)
        self._free = list(range(memory.num_blocks - 1, -1, -1))  # a stack, lowest on top: neighbours make longer runs
        self._private: set[int] = set()
        self._published: dict[BlockHash, _Published] = {}
        self._dropped: dict[BlockHash, int] = {}  # unfindable, slot held until the last unpin
        self._hash_of: dict[int, BlockHash] = {}  # published and dropped slots

    # -- what is there --

    def __len__(self) -> int:
        return len(self._published)

    @property
    def num_slots(self) -> int:
        """Size of the pool in blocks."""
        return self.memory.num_blocks

    @property
    def num_free(self) -> int:
        """Number of slots that hold nothing."""
        return len(self._free)

    @property
    def num_private(self) -> int:
        """Number of slots that callers fill at present."""
        return len(self._private)

    def contains(self, block_hash: BlockHash) -> bool:
        """Return whether the block can be pinned. No use."""
        return block_hash in self._published

    def prefix_length(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many consecutive blocks from the start are here. No use."""
        for num_found, block_hash in enumerate(hashes):
            if block_hash not in self._published:
                return num_found
        return len(hashes)

    def hashes(self) -> Iterator[BlockHash]:
        """Iterate over the findable blocks, in the order of publication. The tier must not change meanwhile."""
        return iter(self._published)

    def find(self, block_hash: BlockHash) -> ResidentBlock | None:
        """Return what is known of a findable block. No use, no pin."""
        entry = self._published.get(block_hash)
        if entry is None:
            return None
        return ResidentBlock(
            entry.slot, block_hash, entry.parent_hash, entry.proof, self._policy.was_reused(block_hash)
        )

    # -- in --

    def begin_insert(self, num_blocks: int, after: BlockHash | None = None) -> list[int]:
        """Return up to `num_blocks` private slots: free ones, then evicted blocks'. Fewer if pins hold the rest.

        Their content is unknown, and nobody reads them. Each goes to `publish` or `abandon`. `after` is the block that
        the new ones follow, if any: making room for them does not evict it.
        """
        slots = self.take_free(num_blocks)
        while len(slots) < num_blocks:
            evicted = self.evict(keep=after)
            if evicted is None:
                break
            if self._on_evict is not None:
                self._on_evict(evicted)
            slots.append(evicted.slot)
        return slots

    def take_free(self, num_blocks: int) -> list[int]:
        """Return up to `num_blocks` private slots without evicting anything."""
        if num_blocks < 0:
            raise ValueError(f"cannot insert {num_blocks} blocks")
        slots = [self._free.pop() for _ in range(min(num_blocks, len(self._free)))]
        self._private.update(slots)
        return slots

    def evict(self, keep: BlockHash | None = None) -> ResidentBlock | None:
        """Make the policy's next victim, which is not `keep`, unfindable; None if there is none.

        Its slot is the caller's, private, with the bytes still in it: to copy away before it is filled or abandoned.
        `on_evict` is not called.
        """
        victim = self._policy.evict(keep)
        if victim is None:
            return None
        entry = self._published.pop(victim.block_hash)
        del self._hash_of[entry.slot]
        self._private.add(entry.slot)
        self.stats.num_evicted += 1
        self._report(victim.block_hash, False)
        return ResidentBlock(entry.slot, victim.block_hash, entry.parent_hash, entry.proof, victim.was_reused)

    def publish(self, slot: int, block_hash: BlockHash, parent_hash: BlockHash | None, proof: Proof) -> bool:
        """Make a private slot findable. The caller has filled and verified it, and writes to it no more.

        `parent_hash` is None for the first block of a chain (the namespace is no block). If the block is here already,
        that one stays, the slot becomes free, and this returns False. Raises `IntegrityError` for a slot not private.
        """
        self._check_private(slot, "publish")
        self._private.remove(slot)
        if block_hash in self._policy:
            self._free.append(slot)
            return False
        self._policy.insert(block_hash, parent_hash)
        self._published[block_hash] = _Published(slot, parent_hash, proof)
        self._hash_of[slot] = block_hash
        self.stats.num_published += 1
        self._report(block_hash, True)
        return True

    def abandon(self, slots: Iterable[int]) -> None:
        """Give private slots back unpublished. Raises `IntegrityError` for a slot not private."""
        for slot in slots:
            self._check_private(slot, "abandon")
            self._private.remove(slot)
            self._free.append(slot)

    # -- out --

    def pin(self, hashes: Sequence[BlockHash], is_use: bool = True) -> list[PinnedBlock]:
        """Pin the consecutive prefix of `hashes` that is here; each block needs one `unpin`.

        With `is_use` this counts as a use of each, for the policy and in `stats`.
        """
        found = hashes[: self.prefix_length(hashes)]
        pinned: list[PinnedBlock] = []
        for block_hash in found:
            self._policy.pin(block_hash)
            entry = self._published[block_hash]
            pinned.append(PinnedBlock(entry.slot, block_hash, entry.proof))
        if is_use:
            self._policy.touch(found)
            self.stats.num_queried += len(hashes)
            self.stats.num_hits += len(found)
        return pinned

    def unpin(self, slots: Iterable[int]) -> None:
        """Give back one pin on each slot. Raises `DoubleFree` if there is none."""
        for slot in slots:
            block_hash = self._hash_of.get(slot)
            if block_hash is None:
                raise DoubleFree(f"unpin of slot {slot}, which holds no block")
            self._policy.unpin(block_hash)
            if block_hash in self._dropped and self._policy.num_pins(block_hash) == 0:
                self._forget_dropped(block_hash)

    def drop(self, block_hash: BlockHash) -> bool:
        """Make a block unfindable for good, say since its bytes are wrong; False if it was not findable.

        A pinned block keeps its slot until the last `unpin`; until then the same hash cannot be published again.
        """
        entry = self._published.pop(block_hash, None)
        if entry is None:
            return False
        self.stats.num_dropped += 1
        self._dropped[block_hash] = entry.slot
        if self._policy.num_pins(block_hash) == 0:
            self._forget_dropped(block_hash)
        self._report(block_hash, False)
        return True

    def check_integrity(self, expected_pins: int | None = None) -> None:
        """Raise `IntegrityError` unless each slot is in one state, and maps and policy agree. O(num_slots).

        `expected_pins` is the number of pins that the callers count.
        """
        self._policy.check_integrity()
        problems: list[str] = []
        listed = sorted([*self._free, *self._private, *self._hash_of])
        if listed != list(range(self.num_slots)):
            problems.append(
                f"{len(self._free)} free + {len(self._private)} private + {len(self._hash_of)} published of"
                f" {self.num_slots} slots"
            )
        slots = {block_hash: entry.slot for block_hash, entry in self._published.items()} | self._dropped
        if slots != {block_hash: slot for slot, block_hash in self._hash_of.items()}:
            problems.append(f"{len(slots)} blocks do not match the hashes of {len(self._hash_of)} slots")
        if len(self._policy) != len(slots) or any(block_hash not in self._policy for block_hash in slots):
            problems.append(f"the policy knows {len(self._policy)} blocks of {len(slots)}")
        else:
            num_pins = sum(self._policy.num_pins(block_hash) for block_hash in slots)
            if expected_pins is not None and num_pins != expected_pins:
                problems.append(f"{num_pins} pins, their holders count {expected_pins}")
            problems += [
                f"dropped block {block_hash.hex()} has no pin"
                for block_hash in self._dropped
                if self._policy.num_pins(block_hash) == 0
            ]
        if problems:
            raise IntegrityError(f"DRAM tier: {'; '.join(problems[:8])}")

    def _forget_dropped(self, block_hash: BlockHash) -> None:
        slot = self._dropped.pop(block_hash)
        self._policy.remove(block_hash)
        del self._hash_of[slot]
        self._free.append(slot)

    def _report(self, block_hash: BlockHash, is_present: bool) -> None:
        if self._on_change is not None:
            self._on_change(block_hash, is_present)

    def _check_private(self, slot: int, operation: str) -> None:
        if slot not in self._private:
            raise IntegrityError(f"{operation} of slot {slot}, which is not private")
