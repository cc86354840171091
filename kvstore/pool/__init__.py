"""Keeps the books of memory: which block is where, in the paged pool and in the tiers, and who goes next.

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
