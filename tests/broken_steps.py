"""Imported first by a worker of a test: its engine fails in the next step once it gets SIGUSR1, or its process dies or
stands still in the fifth: of a prompt in more chunks than that, some are then computed, and some not.
"""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

ENGINE = "TEST_BREAKS_ENGINE"
"""Names the engine in the worker's environment."""
PROCESS = "TEST_BREAKS_PROCESS"
"""The signal that the process is to send itself instead, SIGKILL or SIGSTOP, by name."""
_STEP = 5
_PLACES = {
    "native": ("services.engine.native", "Engine", "step"),
    "vllm": ("vllm.v1.core.sched.scheduler", "Scheduler", "schedule"),  # as its own assertions do
}


def break_at_signal() -> None:
    """On the main thread, before the worker's `main`."""
    module, owner, method = _PLACES[os.environ[ENGINE]]
    found = getattr(importlib.import_module(module), owner)
    whole, steps = getattr(found, method), list[int]()  # since the signal, which is the first entry
    signal.signal(signal.SIGUSR1, lambda number, frame: steps.append(0))
    by = os.environ.get(PROCESS)

    def step(*arguments: Any, **named: Any) -> Any:
        if steps:
            assert by, "made up"
            steps.append(len(steps))
            if steps[-1] == _STEP:
                os.kill(os.getpid(), signal.Signals[by])
        return whole(*arguments, **named)

    setattr(found, method, step)
