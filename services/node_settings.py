"""Settings that workers and store nodes have in common: whoever exchanges blocks and announces itself.

Each function declares one field; the arguments are what its help says otherwise. The class decides on the order, which
is that of `--help` and of the page.
"""

from __future__ import annotations

from services.settings import SettingsError, setting


def host() -> str:
    return setting("127.0.0.1", help="address to listen on", group="network")


def kv_port() -> int:
    return setting(0, help="block-protocol port; 0 chooses a free one", group="network")


def http_port() -> int:
    return setting(0, help="port of /metrics, /health and /debug/state; 0 chooses a free one", group="network")


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
    return setting(5.0, help=f"registry lease: {whose} silent for so long is forgotten", group="network")


def peer_timeout_s() -> float:
    return setting(5.0, help="a block-protocol peer silent for so long is lost", group="network")


def drain_timeout_s(waits_for: str) -> float:
    return setting(30.0, help=f"how long SIGTERM waits for {waits_for}", group="network")


def log_level() -> str:
    return setting("info", help="what to log", choices=("debug", "info", "warning", "error"), group="logs")


def log_format() -> str:
    return setting(
        "auto", help="text, json, or auto: text on a terminal", choices=("auto", "text", "json"), group="logs"
    )


def check_ports(config: object, *names: str) -> None:
    """Raise `SettingsError` for the first of these fields that is no port number."""
    for name in names:
        if not 0 <= getattr(config, name) <= 65535:
            raise SettingsError(f"must be a port number, got {getattr(config, name)}", name)


def check_positive(config: object, *names: str) -> None:
    """Raise `SettingsError` for the first of these fields that is not positive."""
    for name in names:
        if getattr(config, name) <= 0:
            raise SettingsError(f"must be positive, got {getattr(config, name)}", name)
