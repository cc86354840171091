"""Declares a prefill worker's settings."""

from __future__ import annotations

from dataclasses import dataclass

from services.settings import SettingsError, setting
from services.worker.config import WorkerConfig


@dataclass(frozen=True)
class PrefillConfig(WorkerConfig):
    """A worker's settings, and how long finished blocks are held for their reader."""

    lease_ttl_s: float = setting(
        15.0,
        above=1,
        help="how long blocks are held for a decode worker that no longer renews; longer than a heartbeat, 1 s",
        group="handoff",
    )

    lease_max_s: float = setting(
        3600.0, help="how long blocks are held for one prompt at most, computing it included", group="handoff"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lease_max_s < self.lease_ttl_s:
            raise SettingsError(f"must be at least lease_ttl_s, got {self.lease_max_s}", "lease_max_s")
