"""Places the workers of `tandem up`: which cores, how many threads, which GPU.

Prefill saturates arithmetic and decode saturates memory, so neither slows the other as long as they do not share a
core: the cores are dealt out in equal shares that keep the threads of one physical core together. Router and Redis stay
free. `place_workers` is pure; what the machine has is looked up at the end of the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.machine import cpu_quota, gpus
from services.settings import SettingsError


@dataclass(frozen=True)
class Core:
    """A logical processor, and the physical core that it is a thread of (package number, core number)."""

    number: int
    physical: tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """One worker's place. No cores: unpinned. `gpu`: as CUDA_VISIBLE_DEVICES has it, several with commas between.

    `gpu_share` is the part of the GPU's memory that is the worker's.
    """

    cores: tuple[int, ...] = ()
    num_threads: int | None = None
    num_others_cores: int = 0
    """Physical ones that other workers have, and this one does not."""
    gpu: str | None = None
    gpu_share: float | None = None

    def gpu_memory_utilization(self, alone: float) -> float:
        """The part of a GPU's memory for a worker that would take `alone` if it had the GPU for itself."""
        return round(alone * self.gpu_share, 3) if self.gpu_share is not None and self.gpu_share < 1 else alone


def place_workers(num_workers: int, cores: Sequence[Core], gpus: Sequence[str], gpus_each: int = 1) -> list[Placement]:
    """One place per worker. With fewer cores than workers, some share a core; with fewer GPUs, some share them.

    No cores means: do not pin. One GPU or none means: nothing to choose. Raises SettingsError where there are GPUs, and
    fewer than one worker needs.
    """
    if 0 < len(gpus) < gpus_each:
        raise SettingsError(
            f"--tensor-parallel-size {gpus_each}: there are {len(gpus)} GPUs; give {len(gpus)} or less", "engine_args"
        )
    groups = [",".join(gpus[first : first + gpus_each]) for first in range(0, len(gpus) + 1 - gpus_each, gpus_each)]
    ordered = sorted(cores, key=lambda core: (core.physical, core.number))
    placements = []
    for index in range(num_workers):
        share = _share(index, num_workers, ordered)
        gpu, gpu_share = None, None
        if groups:
            gpu = groups[index % len(groups)]
            gpu_share = 1.0 / sum(1 for other in range(num_workers) if other % len(groups) == index % len(groups))
        placements.append(
            Placement(
                cores=tuple(core.number for core in share),
                num_threads=len({core.physical for core in share}) or None,
                num_others_cores=len({core.physical for core in cores} - {core.physical for core in share}),
                gpu=gpu,
                gpu_share=gpu_share,
            )
        )
    return placements


def _share(index: int, num_workers: int, cores: Sequence[Core]) -> Sequence[Core]:
    if not cores:
        return ()
    if len(cores) < num_workers:
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // num_workers : (index + 1) * len(cores) // num_workers]


def available_cores() -> list[Core]:
    """The logical processors that this process may use, no more than its control group's quota; [] where unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = []
    for number in sorted(os.sched_getaffinity(0)):
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
        try:
            physical = (int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text()))
        except (OSError, ValueError):
            physical = (0, number)
        cores.append(Core(number, physical))
    cores.sort(key=lambda core: (core.physical, core.number))
    return cores[: cpu_quota() or len(cores)]


def available_gpus() -> list[str]:
    """Lists the GPUs that CUDA_VISIBLE_DEVICES allows, else this machine's NVIDIA devices, by number."""
    return [gpu.name for gpu in gpus()]
