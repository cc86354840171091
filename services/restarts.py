"""Says when a process that has ended is started again, and how it ended. Pure."""

from __future__ import annotations

import signal
from typing import Final

STABLE_S: Final = 30.0
"""A process that has run for so long before it died starts again at once."""


def restart_delay_s(num_failures: int) -> float:
    """The pause before the next start, after so many failures in a row (at least 1): 0, 1, 2, 4, … 30 seconds."""
    return 0.0 if num_failures == 1 else float(min(2 ** (num_failures - 2), 30))


def describe_exit(status: int) -> str:
    """`exited with status 1`, `was killed by SIGSEGV`."""
    if status >= 0:
        return f"exited with status {status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"
