"""Declares the settings that both kinds of worker share, spelled as in `vllm serve` where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass

from services import node_settings
from services.engine.config import EngineConfig
from services.settings import SettingsError, setting

_WILDCARDS = ("", "0.0.0.0", "::", "[::]")


@dataclass(frozen=True)
class WorkerConfig(EngineConfig):
    """One worker process: its engine's settings, and whom it serves and where."""

    served_model_name: tuple[str, ...] = setting(
        (), help="name(s) under which clients ask for the model; the default is the value of --model", group="model"
    )
    tokenizer: str = setting(
        "", help="directory or hub name of the tokenizer; the default is the model's", group="model"
    )
    host: str = node_settings.host()
    port: int = setting(0, min=0, max=65535, help="gRPC port; 0 chooses a free one", group="network")
    kv_port: int = node_settings.kv_port()
    http_port: int = node_settings.http_port()
    advertise_host: str = node_settings.advertise_host("others reach this worker")
    redis: str = node_settings.redis()
    worker_id: str = node_settings.worker_id("this worker", "ROLE-HOST-PORT")
    kv_transport: str = node_settings.kv_transport("RDMA, CUDA IPC and shared memory")
    lease_s: float = node_settings.lease_s("a worker")
    peer_timeout_s: float = node_settings.peer_timeout_s()
    prefix_fetch_timeout_s: float = setting(
        5.0,
        above=0,
        help="how long nothing may come of a prefix that another worker holds; then it is computed",
        group="network",
    )
    prefix_fetch: str = setting(
        "measured",
        help="when a prefix is fetched from another holder: where that was measured to be quicker than computing it,"
        " always, or never",
        choices=("measured", "always", "never"),
        group="KV cache",
    )
    store_write_through: str = setting(
        "all",
        help="which blocks are offered to store nodes, where there are any: all, those that were reused here, or none",
        choices=("all", "reused", "none"),
        group="KV cache",
    )
    drain_timeout_s: float = node_settings.drain_timeout_s("running requests")
    log_level: str = node_settings.log_level()
    log_format: str = node_settings.log_format()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host in _WILDCARDS and not self.advertise_host:
            raise SettingsError(f"{self.host} is no address that others can dial: give --advertise-host too", "host")
