"""Brings prefixes back from the host tier: takes blocks, fills them, verifies, publishes.

    begin (engine) -> copy and verify (any thread) -> end (engine): cached blocks, which the prompt finds

A prompt's prefix comes back before it is queued, beside the steps of others (`services.worker.host_prefixes`). What it
still lacks when its turn is near (evicted while it waited, or preempted) comes back between two steps (`bring_back`),
in a small part of the time that computing it takes. Whoever calls `begin` must call `end`, which gives back lent blocks
and pinned slots.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.block import BlockHash
from kvstore.pool import CopiedBack, HostTier
from services.engine.api import Restore
from services.engine.native.scheduling import Scheduler

# As many requests may begin in one step at most with blocks that come back right before it.
_MAX_NEXT = 4


def begin_restore(tier: HostTier, scheduler: Scheduler, hashes: Sequence[BlockHash]) -> Restore | None:
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
    return Restore(tuple(wanted), taken, tuple(pinned))


def end_restore(tier: HostTier, scheduler: Scheduler, restore: Restore, copied: CopiedBack) -> None:
    """Publish what came back whole, up to the first block that did not; give back everything else."""
    start, end = restore.room.num_present, restore.room.num_present + copied.num_whole
    # Peers ask for what they lack: that may begin in the middle of a chain.
    parent_hash = restore.hashes[start - 1] if start else tier.parent_of(restore.hashes[0])
    proofs = [block.proof for block in restore.pinned[: copied.num_whole]]
    scheduler.publish_lent(restore.room.block_ids[start:end], restore.hashes[start:end], proofs, parent_hash)
    scheduler.release_lent(restore.room.block_ids)
    tier.unpin(restore.pinned, copied)


def bring_back(tier: HostTier, scheduler: Scheduler) -> None:
    """Bring back at once what the requests lack whose turn comes next. Between steps only: it writes to free blocks,
    and those may be what a step that was scheduled copies from.
    """
    for hashes in scheduler.next_prefixes(_MAX_NEXT):
        num_cached = scheduler.pool.peek_prefix(hashes)
        if num_cached == len(hashes) or not tier.may_have(hashes[num_cached]):
            continue
        restore = begin_restore(tier, scheduler, hashes)
        if restore is None:
            return
        end_restore(tier, scheduler, restore, tier.copy_back(restore.pinned, restore.missing_ids))
