"""Measures who uses this machine's processors during a run: we and what we started, or others.

Others are the difference between what the kernel counts for the processors that we may use, and what it counts for this
process and its descendants. What the host takes away from a virtual machine (steal) counts as others'.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

from loadtest.figures import MachineUse

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class MachineWatch:
    """Counts from when it is made. Processes that end in between count as others: make it when all are up.

    In a container that may use a part of the machine's time only (a quota), nothing is known: others use the rest of it
    with every right.
    """

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._start_busy_s, self._start_ours_s = _busy_s(), _ours_s()

    def use(self) -> MachineUse | None:
        """The means since the start."""
        if _has_quota():
            return None
        passed_s = max(1e-6, time.perf_counter() - self._start_s)
        ours = max(0.0, _ours_s() - self._start_ours_s) / passed_s
        busy = max(0.0, _busy_s() - self._start_busy_s) / passed_s
        return MachineUse(len(_processors()), ours, max(0.0, busy - ours))


def _has_quota() -> bool:
    try:
        return not _QUOTA.read_text().startswith("max")
    except OSError:  # no control group, or not Linux
        return False


def _processors() -> list[int]:
    allowed = getattr(psutil.Process(), "cpu_affinity", None)  # not on macOS
    return list(allowed()) if allowed else list(range(psutil.cpu_count() or 1))


def _busy_s() -> float:
    """Seconds for which our processors were not idle, or were taken away."""
    times = psutil.cpu_times(percpu=True)
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests' time is in the user's too
    return sum(
        sum(value for name, value in times[number]._asdict().items() if name not in idle) for number in _processors()
    )


def _ours_s() -> float:
    me = psutil.Process()
    total_s = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s
