"""A store node's settings."""

from __future__ import annotations

from dataclasses import dataclass

from services.settings import SettingsError, setting


@dataclass(frozen=True)
class StoreConfig:
    """One store node: whose blocks it keeps, how many, and where it listens."""

    served_model_name: tuple[str, ...] = setting(
        (),
        help="keep the blocks of the model that workers serve under this name; the default is the only model there is",
        group="store",
    )
    store_dram_bytes: int = setting(1 << 30, help="memory for blocks, e.g. 64GiB", group="store")
    store_disk_dir: str = setting(
        "", help="directory for blocks on disk, of this node alone; none: no disk", group="store"
    )
    store_disk_bytes: int = setting(16 << 30, help="size of the files in --store-disk-dir at most", group="store")
    store_disk_writes: str = setting(
        "all",
        help="which blocks go to disk: all and reused soon, evicted when they leave memory; none: it is only read",
        choices=("all", "reused", "evicted", "none"),
        group="store",
    )
    host: str = setting("127.0.0.1", help="address to listen on", group="network")
    kv_port: int = setting(0, help="block-protocol port; 0 chooses a free one", group="network")
    http_port: int = setting(
        0, help="port of /metrics, /health and /debug/state; 0 chooses a free one", group="network"
    )
    advertise_host: str = setting(
        "", help="address under which workers reach this node; the default is --host", group="network"
    )
    redis: str = setting("redis://127.0.0.1:6379/0", help="URL of the registry", group="network", secret=True)
    worker_id: str = setting(
        "", help="name of this node, unique in the deployment; the default is store-HOST-PORT", group="network"
    )
    kv_transport: str = setting(
        "auto",
        help="how blocks travel; auto takes nixl on RDMA and shared memory, ucxx on TCP",
        choices=("auto", "ucxx", "nixl"),
        group="network",
    )
    lease_s: float = setting(5.0, help="registry lease: a node silent for so long is forgotten", group="network")
    peer_timeout_s: float = setting(5.0, help="a block-protocol peer silent for so long is lost", group="network")
    drain_timeout_s: float = setting(
        30.0, help="how long SIGTERM waits for blocks to be written to disk", group="network"
    )
    log_level: str = setting("info", help="what to log", choices=("debug", "info", "warning", "error"), group="logs")
    log_format: str = setting(
        "auto", help="text, json, or auto: text on a terminal", choices=("auto", "text", "json"), group="logs"
    )

    def __post_init__(self) -> None:
        for name in ("store_dram_bytes", "store_disk_bytes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"must be positive, got {getattr(self, name)}", name)
        for name in ("kv_port", "http_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise SettingsError(f"must be a port number, got {getattr(self, name)}", name)
        for name in ("lease_s", "peer_timeout_s", "drain_timeout_s"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"must be positive, got {getattr(self, name)}", name)
