"""Holds the engine's KV blocks: the paged pool on the device, the host tier, and their sizes."""

from services.engine.native.memory.capacity import choose_num_blocks, choose_num_host_slots
from services.engine.native.memory.host_copies import open_host_tier
from services.engine.native.memory.host_prefixes import begin_restore, bring_back
from services.engine.native.memory.kv_memory import allocate_kv_cache, block_memory

__all__ = [
    "allocate_kv_cache",
    "begin_restore",
    "block_memory",
    "bring_back",
    "choose_num_blocks",
    "choose_num_host_slots",
    "open_host_tier",
]
