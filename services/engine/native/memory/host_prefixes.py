"""Brings prefixes back from the host tier: takes blocks, fills them, verifies, publishes.

    begin (engine) -> copy and verify (any thread) -> end (engine): cached blocks, which the prompt finds

A prompt's prefix comes back before it is queued, beside the steps of others (`services.worker.prefixes`). What it
still lacks when its turn is near (evicted while it waited, or preempted) comes back between two steps (`bring_back`),
in a small part of the time that computing it takes. Whoever calls `begin` must call `end`, which gives back lent blocks
and pinned slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.block import BlockHash
from kvstore.pool import NOTHING_COPIED, Block, CopiedBack, HostTier
from kvstore.protocol import Reservation
from services.engine.native.scheduling import Scheduler

# As many requests may begin in one step at most with blocks that come back right before it.
_MAX_NEXT = 4


@dataclass(eq=False)
class HostRestore:
    """The port's `Restore`."""

    tier: HostTier
    scheduler: Scheduler
    hashes: Sequence[BlockHash]
    room: Reservation  # lent, one block per hash
    pinned: Sequence[Block]  # what comes into the blocks that are not present
    on_ended: Callable[[], None]
    copied: CopiedBack = NOTHING_COPIED

    @property
    def missing_ids(self) -> list[int]:
        """The blocks to be filled."""
        return self.room.block_ids[self.room.num_present :]

    def copy_back(self) -> None:
        self.copied = self.tier.copy_back(self.pinned, self.missing_ids)

    def end(self) -> CopiedBack:
        """Publish what came back whole, up to the first block that did not; give back everything else."""
        start, end = self.room.num_present, self.room.num_present + self.copied.num_whole
        # Peers ask for what they lack: that may begin in the middle of a chain.
        parent_hash = self.hashes[start - 1] if start else self.pinned[0].parent_hash
        proofs = [block.proof for block in self.pinned[: self.copied.num_whole]]
        self.scheduler.publish_lent(self.room.block_ids[start:end], self.hashes[start:end], proofs, parent_hash)
        self.scheduler.release_lent(self.room.block_ids)
        self.tier.unpin(self.pinned, self.copied)
        self.on_ended()
        return self.copied


def begin_restore(
    tier: HostTier, scheduler: Scheduler, hashes: Sequence[BlockHash], on_ended: Callable[[], None] = lambda: None
) -> HostRestore | None:
    """Pin and take what is needed to bring back the blocks that follow the cached prefix of `hashes`.

    None, taking nothing, where the tier has none of them, or where the running requests need the room.
    """
    num_cached = scheduler.pool.peek_prefix(hashes)
    # Pinned first: taking blocks may evict others into the tier, and these must not give way to them.
    pinned = tier.pin(hashes[num_cached:])
    wanted = hashes[: num_cached + len(pinned)]
    taken = scheduler.take_prefix(wanted) if pinned else None
    if taken is None:
        tier.unpin(pinned)
        return None
    return HostRestore(tier, scheduler, wanted, taken, pinned, on_ended)


def bring_back(tier: HostTier, scheduler: Scheduler) -> None:
    """Bring back what the next requests lack. Between steps only: it writes to free blocks, which a step may copy."""
    for hashes in scheduler.next_prefixes(_MAX_NEXT):
        num_cached = scheduler.pool.peek_prefix(hashes)
        if num_cached == len(hashes) or not tier.may_have(hashes[num_cached]):
            continue
        restore = begin_restore(tier, scheduler, hashes)
        if restore is None:
            return
        restore.copy_back()
        restore.end()
