"""Which blocks are where in memory: the paged pool of an engine, the tiers beside it, and who must go next.

Bookkeeping of one thread: ids, references and hashes, no I/O."""

from kvstore.pool.block_pool import BlockPool
from kvstore.pool.eviction import PROTECTED_SHARE
from kvstore.pool.host_tier import NOTHING_COPIED, BlockCopier, CopiedBack, HostTier
from kvstore.pool.slot_book import Block, CacheChange, CacheEvent, SlotBook

__all__ = [
    "NOTHING_COPIED",
    "PROTECTED_SHARE",
    "Block",
    "BlockCopier",
    "BlockPool",
    "CacheChange",
    "CacheEvent",
    "CopiedBack",
    "HostTier",
    "SlotBook",
]
