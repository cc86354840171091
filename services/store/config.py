"""Declares a store node's settings."""

from __future__ import annotations

from dataclasses import dataclass

from services import node_settings
from services.settings import Settings, setting


@dataclass(frozen=True)
class StoreConfig(Settings):
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
    host: str = node_settings.host()
    kv_port: int = node_settings.kv_port()
    http_port: int = node_settings.http_port()
    advertise_host: str = node_settings.advertise_host("workers reach this node")
    redis: str = node_settings.redis()
    worker_id: str = node_settings.worker_id("this node", "store-HOST-PORT")
    kv_transport: str = node_settings.kv_transport("RDMA and shared memory")
    lease_s: float = node_settings.lease_s("a node")
    peer_timeout_s: float = node_settings.peer_timeout_s()
    drain_timeout_s: float = node_settings.drain_timeout_s("blocks to be written to disk")
    log_level: str = node_settings.log_level()
    log_format: str = node_settings.log_format()
