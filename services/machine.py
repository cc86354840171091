"""Reads what this machine has and the control group leaves us: memory, processors, instructions.

The only place that reads /proc and the control group's files. What cannot be known (not Linux) is 0, None or empty.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Return what can be allocated without swapping, within the control group's limit; 0 where unknown."""
    available = int(_field("meminfo", "MemAvailable").partition(" ")[0] or 0) << 10
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max": no limit
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, max(0, limit - used))
    return available


def cpu_quota() -> int | None:
    """The control group's limit in whole processors, rounded up; None where there is none."""
    try:
        quota, period = map(int, (_CGROUP / "cpu.max").read_text().split())
    except (OSError, ValueError):  # "max" for the quota
        return None
    return max(1, -(-quota // period))


def processor_flags() -> frozenset[str]:
    """Return the abilities of the first processor that the system allows, in the kernel's words."""
    return frozenset((_field("cpuinfo", "flags") or _field("cpuinfo", "Features")).split())


def _field(file: str, name: str) -> str:
    """The first value of that name in a file of `name: value` lines; empty where there is none."""
    with contextlib.suppress(OSError):
        for line in (_PROC / file).read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""
