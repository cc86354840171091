"""Settings of the commands that run nothing themselves: `tandem up` and `tandem doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.settings import SettingsError, setting

DEMO_MODEL = Path(__file__).parents[2] / "deploy" / "demo_model" / "tandem-demo"
"""Present in a checkout, absent from an installed wheel."""


@dataclass(frozen=True)
class UpConfig:
    """The stack on one machine. The workers' and the router's own settings are accepted beside these, and passed on."""

    model: str = setting(
        "",
        help="directory of a Hugging Face model, or its name on the hub; the default is the demo model",
        group="stack",
    )
    prefill: int = setting(1, help="prefill workers", group="stack")
    decode: int = setting(1, help="decode workers", group="stack")
    colocated: bool = setting(
        False, help="no prefill workers: each decode worker prefills its own prompts", group="stack"
    )
    stores: int = setting(0, help="store nodes: they keep KV blocks beyond the workers' own caches", group="stack")
    redis: str = setting("", help="URL of the registry; the default is a private Redis", group="stack", secret=True)
    pin: bool = setting(True, help="give each worker cores of its own (Linux)", group="stack")
    startup_timeout_s: float = setting(600.0, help="how long the models may take to load", group="stack")
    log_format: str = setting(
        "auto",
        help="auto and text: a prefix per process; json: one object per line",
        choices=("auto", "text", "json"),
        group="logs",
    )

    def __post_init__(self) -> None:
        if self.prefill < 0:
            raise SettingsError(f"must not be negative, got {self.prefill}", "prefill")
        if self.stores < 0:
            raise SettingsError(f"must not be negative, got {self.stores}", "stores")
        if self.decode < 1:
            raise SettingsError(f"must be at least 1, got {self.decode}", "decode")
        if self.startup_timeout_s <= 0:
            raise SettingsError(f"must be positive, got {self.startup_timeout_s}", "startup_timeout_s")


@dataclass(frozen=True)
class DoctorConfig:
    """What to examine."""

    model: str = setting("", help="directory of a Hugging Face model; the default is the demo model")
    redis: str = setting("", help="URL of the registry; the default examines the private Redis", secret=True)
    host: str = setting("127.0.0.1", help="address that the router will listen on")
    port: int = setting(8000, help="port that the router will listen on")
    json: bool = setting(False, help="print one JSON object")

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise SettingsError(f"must be a port number, got {self.port}", "port")
