"""The store node: keeps blocks in DRAM over disk, and fetches what workers offer.

`services.store` is the process around it."""

from kvstore.store.directory import check_directory
from kvstore.store.disk_tier import DiskTier
from kvstore.store.node import StoreNode, StoreTooSmall
from kvstore.store.tiered_store import StoreTier, TieredStore
from kvstore.store.write_behind import DiskWrites

__all__ = ["DiskTier", "DiskWrites", "StoreNode", "StoreTier", "StoreTooSmall", "TieredStore", "check_directory"]
