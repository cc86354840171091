"""Which blocks are where in memory: the paged pool of an engine, the tiers beside it, and who must go next.

Bookkeeping of one thread: ids, references and hashes, no I/O."""

from kvstore.pool.block_pool import BlockPool, CacheChange, CacheEvent
from kvstore.pool.dram_tier import DramTier, PinnedBlock, ResidentBlock
from kvstore.pool.eviction import DEFAULT_PROTECTED_SHARE, SegmentedLru
from kvstore.pool.host_tier import NOTHING_COPIED, BlockCopier, CopiedBack, HostChange, HostTier

__all__ = [
    "DEFAULT_PROTECTED_SHARE",
    "NOTHING_COPIED",
    "BlockCopier",
    "BlockPool",
    "CacheChange",
    "CacheEvent",
    "CopiedBack",
    "DramTier",
    "HostChange",
    "HostTier",
    "PinnedBlock",
    "ResidentBlock",
    "SegmentedLru",
]
