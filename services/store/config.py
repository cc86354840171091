"""Declares a store node's settings."""

from __future__ import annotations

from dataclasses import dataclass

from services.node_settings import NodeSettings
from services.settings import setting


@dataclass(frozen=True)
class StoreConfig(NodeSettings):
    """One store node: whose blocks it keeps, how many, and where it listens."""

    served_model_name: tuple[str, ...] = setting(
        (),
        help="keep the blocks of the model that workers serve under this name; the default is the only model there is",
        group="store",
    )
    store_dram_bytes: int = setting(1 << 30, above=0, help="memory for blocks, e.g. 64GiB", group="store")
    store_disk_dir: str = setting(
        "", help="directory for blocks on disk, of this node alone; none: no disk", group="store"
    )
    store_disk_bytes: int = setting(
        16 << 30, above=0, help="size of the files in --store-disk-dir at most", group="store"
    )
    store_disk_writes: str = setting(
        "all",
        help="which blocks go to disk: all, reused (those used again), none (it is only read); evicted means all",
        choices=("all", "reused", "evicted", "none"),
        group="store",
    )
