"""Declares a decode worker's settings."""

from __future__ import annotations

from dataclasses import dataclass

from services.settings import setting
from services.worker.config import WorkerConfig


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    """A worker's settings, and when it prefills by itself."""

    local_prefill_max_tokens: int = setting(
        16,
        min=0,
        help="prefill prompts with at most so many uncached tokens here; 0: never while a prefill worker is up",
    )
    colocated: bool = setting(
        False, help="prefill every prompt here: the same engine without disaggregation", group="handoff"
    )
    prefill_queue_timeout_s: float = setting(
        120.0, above=0, help="how long a prompt may wait for its first chunk elsewhere", group="handoff"
    )
    handoff_timeout_s: float = setting(
        60.0, above=0, help="how long each later stage of the handoff may take without progress", group="handoff"
    )
