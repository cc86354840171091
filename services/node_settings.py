"""Declares the settings that workers and store nodes share: block exchange, registration and logs."""

from __future__ import annotations

from dataclasses import dataclass

from services.peer_settings import PeerSettings
from services.settings import SettingsError, setting

_MAX_NAME_CHARS = 256  # see kvstore.registry.worker_record
_MIN_LEASE_S = 0.05  # see kvstore.registry.registry
_HEARTBEAT_S = 0.5  # of the block protocol; see kvstore.protocol.timeouts


@dataclass(frozen=True)
class NodeSettings(PeerSettings):
    """Whoever exchanges blocks and announces itself: where it listens, and what others are told of it."""

    kv_port: int = setting(0, min=0, max=65535, help="block-protocol port; 0 chooses a free one", group="network")
    http_port: int = setting(
        0, min=0, max=65535, help="port of /metrics, /health and /debug/state; 0 chooses a free one", group="network"
    )
    open_metrics: bool = setting(
        True,
        help="/metrics of the HTTP port needs no token, just as /health and /ready; all else there does, if there is a"
        " peer secret",
        group="network",
    )
    advertise_host: str = setting(
        "", help="address under which others reach this process; the default is --host", group="network"
    )
    redis: str = setting("redis://127.0.0.1:6379/0", help="URL of the registry", group="network", secret=True)
    worker_id: str = setting(
        "", help="name of this process, unique in the deployment; the default is ROLE-HOST-PORT", group="network"
    )
    kv_transport: str = setting(
        "auto",
        help="how blocks travel; auto takes nixl on RDMA, CUDA IPC and shared memory, ucxx on TCP",
        choices=("auto", "ucxx", "nixl"),
        group="network",
    )
    lease_s: float = setting(
        5.0, min=_MIN_LEASE_S, help="registry lease: a process silent for so long is forgotten", group="network"
    )
    peer_timeout_s: float = setting(
        2.0,
        above=_HEARTBEAT_S,
        help="a peer silent for so long is lost, on its block connection or with an order of ours, and one that we read"
        " blocks from without a byte coming; longer than a heartbeat, 0.5 s",
        group="network",
    )
    drain_timeout_s: float = setting(
        30.0,
        above=0,
        help="how long SIGTERM waits for running requests, or for blocks to be written to disk",
        group="network",
    )
    stuck_after_s: float = setting(
        2.0,
        above=0,
        help="how long event loop, step loop, a transport or the disk may stand still although there is work, a step"
        " ten times what is expected of it, if that is more; then the process is not ready, and routers leave it",
        group="network",
    )
    stuck_exit_s: float = setting(
        60.0,
        min=0,
        help="how much longer, until the process ends with status 3, to be started again; 0: never",
        group="network",
    )
    log_level: str = setting("info", help="what to log", choices=("debug", "info", "warning", "error"), group="logs")
    log_format: str = setting(
        "auto", help="text, json, or auto: text on a terminal", choices=("auto", "text", "json"), group="logs"
    )
    disable_log_stats: bool = setting(
        False, help="no line every 10 s on how busy this process is, while it is", group="logs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.worker_id
        if len(name) > _MAX_NAME_CHARS or not name.isascii() or (name and not name.isprintable()) or " " in name:
            raise SettingsError(
                f"must be at most {_MAX_NAME_CHARS} printable ASCII characters without spaces, not {name!r:.80}",
                "worker_id",
            )
