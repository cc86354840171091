"""Declares the settings that workers and store nodes share: block exchange and registration.

Each function declares one field; arguments change its help. The class sets the order of `--help` and of the page.
"""

from __future__ import annotations

from services.settings import setting

_MIN_LEASE_S = 0.05  # see kvstore.registry.registry
_HEARTBEAT_S = 1.0  # of the block protocol; see kvstore.protocol.timeouts


def host() -> str:
    return setting("127.0.0.1", help="address to listen on", group="network")


def kv_port() -> int:
    return setting(0, min=0, max=65535, help="block-protocol port; 0 chooses a free one", group="network")


def http_port() -> int:
    return setting(
        0, min=0, max=65535, help="port of /metrics, /health and /debug/state; 0 chooses a free one", group="network"
    )


def advertise_host(who_reaches_whom: str) -> str:
    return setting("", help=f"address under which {who_reaches_whom}; the default is --host", group="network")


def redis() -> str:
    return setting("redis://127.0.0.1:6379/0", help="URL of the registry", group="network", secret=True)


def worker_id(whose: str, default: str) -> str:
    return setting("", help=f"name of {whose}, unique in the deployment; the default is {default}", group="network")


def kv_transport(fast_lanes: str) -> str:
    return setting(
        "auto",
        help=f"how blocks travel; auto takes nixl on {fast_lanes}, ucxx on TCP",
        choices=("auto", "ucxx", "nixl"),
        group="network",
    )


def lease_s(whose: str) -> float:
    return setting(
        5.0, min=_MIN_LEASE_S, help=f"registry lease: {whose} silent for so long is forgotten", group="network"
    )


def peer_timeout_s() -> float:
    return setting(
        5.0,
        above=_HEARTBEAT_S,
        help="a block-protocol peer silent for so long is lost; longer than a heartbeat, 1 s",
        group="network",
    )


def drain_timeout_s(waits_for: str) -> float:
    return setting(30.0, above=0, help=f"how long SIGTERM waits for {waits_for}", group="network")


def log_level() -> str:
    return setting("info", help="what to log", choices=("debug", "info", "warning", "error"), group="logs")


def log_format() -> str:
    return setting(
        "auto", help="text, json, or auto: text on a terminal", choices=("auto", "text", "json"), group="logs"
    )
