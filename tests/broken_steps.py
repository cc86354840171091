"""Imported first by a worker of a test: its engine fails within the next step once it gets SIGUSR1."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

ENGINE = "TEST_BREAKS_ENGINE"
"""Names the engine in the worker's environment."""
_PLACES = {
    "native": ("services.engine.native", "Engine", "step"),
    "vllm": ("vllm.v1.core.sched.scheduler", "Scheduler", "schedule"),  # as its own assertions do
}


def break_at_signal() -> None:
    """On the main thread, before the worker's `main`."""
    module, owner, method = _PLACES[os.environ[ENGINE]]
    found = getattr(importlib.import_module(module), owner)
    whole, broken = getattr(found, method), list[int]()
    signal.signal(signal.SIGUSR1, lambda number, frame: broken.append(number))

    def step(*arguments: Any, **named: Any) -> Any:
        assert not broken, "made up"
        return whole(*arguments, **named)

    setattr(found, method, step)
