"""Keeps a worker's host-memory tier: copies in what its paged cache evicts, and gives it back.

    paged block is evicted -> copied into a slot, within the allocation that evicts it: findable again
    -> pinned, copied into a paged block, verified there, unpinned -> still findable

The copy is made at the eviction and not ahead of it: each block is in one place, so the capacities of both tiers add
up; nothing is copied that is never evicted; no copy can be torn by the block's next user. It costs the evicting step
one pass over as many bytes as this step, or the next ones, will compute.

All methods belong to the thread of the paged pool (the engine's), except where they say otherwise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvstore.block import BlockHash, BlockMemory, HostMemory, ProofKey, subject_of
from kvstore.errors import IntegrityError
from kvstore.pool.eviction import PROTECTED_SHARE
from kvstore.pool.slot_book import Block, CacheChange, SlotBook


class BlockCopier(Protocol):
    """Copies whole blocks between the paged pool and the host tier's slots."""

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copy paged blocks into slots; on return the paged blocks may be overwritten."""

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """Copy slots into paged blocks; on return the bytes are there. Called on any thread."""


@dataclass
class HostTierStats:
    """Counts since the start."""

    num_offloaded: int = 0  # blocks copied in
    num_lost: int = 0  # evicted by the paged cache and not taken: every slot was pinned
    num_restored: int = 0  # blocks copied back and found whole: the hits
    num_corrupt: int = 0  # blocks whose bytes had changed here, found on their way back
    offload_s: float = 0.0  # spent copying, on the engine's thread
    restore_s: float = 0.0  # spent copying back and verifying, mostly on other threads


class CopiedBack(NamedTuple):
    """The result for pinned blocks: for each whether its bytes are right, and the seconds that it all took."""

    is_whole: list[bool]
    seconds: float

    @property
    def num_whole(self) -> int:
        """Blocks before the first one that is not right."""
        return [*self.is_whole, False].index(False)


NOTHING_COPIED = CopiedBack([], 0.0)


class HostTier:
    """A book of slots in main memory, with their bytes, that a paged pool evicts into."""

    def __init__(self, memory: HostMemory, paged: BlockMemory, copier: BlockCopier, proof_key: ProofKey) -> None:
        if memory.block_bytes != paged.block_bytes:
            raise ValueError(f"slots of {memory.block_bytes} bytes for blocks of {paged.block_bytes}")
        self.stats = HostTierStats()
        self._memory = memory
        self._changes: deque[CacheChange] = deque(maxlen=4 * memory.num_blocks)  # for an index of hints
        self._book = SlotBook(memory.num_blocks, PROTECTED_SHARE, on_change=self._changes.append)
        self._paged = paged
        self._copier = copier
        self._proof_key = proof_key
        self._num_pins = 0

    def may_have(self, block_hash: BlockHash) -> bool:
        """Whether the block is here. A hint, from any thread."""
        return self._book.contains(block_hash)

    def hashes(self) -> list[BlockHash]:
        """Identities of all findable blocks. From any thread."""
        return self._book.hashes()

    # -- in --

    def take_evicted(self, blocks: Sequence[Block]) -> None:
        """Copy in what the paged pool is evicting. Waits for nothing: where there is no slot, a block is lost."""
        unknown = [block for block in blocks if not self._is_known(block.block_hash)]
        # Bounded: else one eviction of many would push out all that is here. The last ones are heads of chains.
        chosen = unknown[-max(1, self._book.num_slots // 2) :]
        slots = [slot for block in chosen for slot in self._book.take(1, keep=block.parent_hash)]
        chosen = chosen[len(chosen) - len(slots) :]
        self.stats.num_lost += len(unknown) - len(chosen)
        if not slots:
            return
        started_s = time.perf_counter()
        self._copier.copy_out([block.slot for block in chosen], slots)
        self.stats.offload_s += time.perf_counter() - started_s
        self.stats.num_offloaded += len(slots)
        for block, slot in zip(chosen, slots, strict=True):
            self._book.publish(slot, block.block_hash, block.parent_hash, block.proof)
        self._book.release(slots)

    # -- out --

    def pin(self, hashes: Sequence[BlockHash]) -> list[Block]:
        """Pin the longest prefix of `hashes` that is here, as a use of it; `unpin` gives it back."""
        pinned = self._book.pin(hashes)
        self._num_pins += len(pinned)
        return pinned

    def copy_back(self, pinned: Sequence[Block], block_ids: Sequence[int]) -> CopiedBack:
        """Copy pinned blocks into paged blocks of the caller's, and verify them there. On any thread."""
        started_s = time.perf_counter()
        self._copier.copy_in([block.slot for block in pinned], block_ids)
        subjects = [subject_of(block.block_hash) for block in pinned]
        wrong = self._proof_key.find_wrong(self._paged, block_ids, subjects, [block.proof for block in pinned])
        is_whole = [position not in wrong for position in range(len(pinned))]
        return CopiedBack(is_whole, time.perf_counter() - started_s)

    def unpin(self, pinned: Sequence[Block], copied: CopiedBack = NOTHING_COPIED) -> None:
        """Give pins back; `copied` is what `copy_back` said of them. What has changed in memory is dropped."""
        self.stats.num_restored += sum(copied.is_whole)
        self.stats.restore_s += copied.seconds
        wrong = [block.slot for block, whole in zip(pinned, copied.is_whole, strict=False) if not whole]
        self.stats.num_corrupt += self._book.drop(wrong)
        self._num_pins -= len(pinned)
        self._book.release([block.slot for block in pinned])

    # -- state --

    def take_changes(self) -> list[CacheChange]:
        """Returns what became findable, or ceased to be, since the last call, in order."""
        changes = list(self._changes)
        self._changes.clear()
        return changes

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless each slot is in one state and accounted for. O(num_slots)."""
        self._book.check_integrity()
        if self._book.num_references_held != self._num_pins:
            held = self._book.num_references_held
            raise IntegrityError(f"host tier: {held} references, {self._num_pins} pins")

    def state(self) -> dict[str, float]:
        """Returns lengths and counts for `/debug/state`, each right for some moment. From any thread."""
        return {
            "num_slots": self._book.num_slots,
            "num_blocks": len(self._book),
            "num_pins": self._num_pins,
            "num_evicted": self._book.stats.num_evictions,
            **vars(self.stats),
        }

    def _is_known(self, block_hash: BlockHash) -> bool:
        """Whether the block is here already, from an earlier eviction; then it is now as fresh as a new one."""
        known = self._book.match_prefix([block_hash])
        self._book.release(known)
        return bool(known)
