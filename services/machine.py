"""Reads what this machine has and the control group leaves us: memory, processors, instructions, GPUs.

The only place that reads /proc, the control group's files and the NVIDIA driver. What cannot be known (not Linux) is 0,
None or empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_DEV = Path("/dev")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name for CUDA_VISIBLE_DEVICES, its memory and its model; 0 and "" where nobody says."""

    name: str
    total_bytes: int = 0
    free_bytes: int = 0
    model: str = ""


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


def gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that CUDA_VISIBLE_DEVICES allows, else all. Neither torch nor CUDA is loaded."""
    numbers = [path.name.removeprefix("nvidia") for path in _DEV.glob("nvidia[0-9]*")]
    names = sorted((number for number in numbers if number.isdigit()), key=int)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names and visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    return [_gpu(name) for name in names]


def _gpu(name: str) -> Gpu:
    """What the driver says of a GPU, by its number or its UUID."""
    try:
        import pynvml  # nvidia-ml-py, which comes with the transports
    except ImportError:
        return Gpu(name)
    try:
        pynvml.nvmlInit()
        is_number = name.isdigit()
        device = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if is_number else pynvml.nvmlDeviceGetHandleByUUID(name)
        memory, model = pynvml.nvmlDeviceGetMemoryInfo(device), pynvml.nvmlDeviceGetName(device)
    except (pynvml.NVMLError, OSError):  # a driver that is broken, or hidden from this container
        return Gpu(name)
    return Gpu(name, int(memory.total), int(memory.free), str(model))


def _field(file: str, name: str) -> str:
    """The first value of that name in a file of `name: value` lines; empty where there is none."""
    with contextlib.suppress(OSError):
        for line in (_PROC / file).read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""


_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # see malloc.h
_MAX_ARENAS = 2
_LARGE_BYTES = 256 << 10


def bound_heaps() -> None:
    """Have threads share a few heaps, since each keeps what it once used, and have nothing large in them: else glibc
    would, once something large has been freed, keep what is as large in a heap. Call it before there are threads.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_ARENA_MAX, _MAX_ARENAS)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def trim_memory() -> None:
    """Give what was freed back to the system; takes milliseconds, without the interpreter's lock. glibc."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
