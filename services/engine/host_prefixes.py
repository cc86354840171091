"""Prefixes that come back from the host tier: blocks are taken, filled outside the engine's thread, then published.

    begin (engine) -> copy and verify (any other thread) -> end (engine): cached blocks, which the prompt finds

What is on its way holds lent blocks and pinned slots; both go back in `end`, which whoever began must call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.block_hash import BlockHash
from kvstore.dram_tier import PinnedBlock
from kvstore.host_tier import HostTier
from services.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Restore:
    """A prefix on its way back. `block_ids` are lent, one per hash; those after `num_present` await their content."""

    hashes: tuple[BlockHash, ...]
    block_ids: tuple[int, ...]
    num_present: int
    pinned: tuple[PinnedBlock, ...]  # what comes into block_ids[num_present:]

    @property
    def missing_ids(self) -> tuple[int, ...]:
        """The blocks to be filled."""
        return self.block_ids[self.num_present :]


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
    return Restore(tuple(wanted), tuple(taken.block_ids), taken.num_present, tuple(pinned))


def end_restore(tier: HostTier, scheduler: Scheduler, restore: Restore, is_whole: Sequence[bool]) -> int:
    """Publish what came back whole, up to the first block that did not; give back everything else.

    `is_whole` is what `HostTier.copy_back` returned, or empty where it failed. Returns the number of blocks published.
    """
    num_whole = next((index for index, whole in enumerate(is_whole) if not whole), len(is_whole))
    end = restore.num_present + num_whole
    scheduler.publish_lent(restore.block_ids[:end], restore.hashes[:end])
    scheduler.release_lent(restore.block_ids)
    tier.unpin(restore.pinned, is_whole)
    return num_whole
