"""Settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass

from services.settings import SettingsError, setting
from services.worker.config import WorkerConfig


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    """A worker's settings, and when it prefills by itself."""

    local_prefill_max_tokens: int = setting(
        16,
        help="prefill prompts with at most so many uncached tokens here; 0: never while a prefill worker is up",
    )
    colocated: bool = setting(
        False, help="prefill every prompt here: the same engine without disaggregation", group="handoff"
    )
    prefill_queue_timeout_s: float = setting(
        120.0, help="how long a prompt may wait for its first chunk elsewhere", group="handoff"
    )
    handoff_timeout_s: float = setting(
        60.0, help="how long each later stage of the handoff may take without progress", group="handoff"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_prefill_max_tokens < 0:
            raise SettingsError(
                f"must not be negative, got {self.local_prefill_max_tokens}",
                "local_prefill_max_tokens",
            )
        for name in ("prefill_queue_timeout_s", "handoff_timeout_s"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"must be positive, got {getattr(self, name)}", name)
