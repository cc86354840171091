"""Chooses this machine's kernels once, at start, and says why in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from services.engine.cpu_kernels import AUTOMATIC, NOT_BUILT, lacking, library_path
from services.engine.native.kernels.library import KernelError, KernelLibrary
from services.engine.native.kernels.self_check import check
from services.machine import processor_flags

_TRIAL_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class KernelChoice:
    """A library that has passed its check here, or None; `reason` is one line for a person."""

    library: KernelLibrary | None
    reason: str


@lru_cache
def choose_kernels(wanted: str = "auto") -> KernelChoice:
    """Return this machine's choice, as --cpu-kernels says; made once in a process."""
    return choose(wanted, processor_flags(), library_path, load_checked)


def choose(
    wanted: str, flags: Set[str], find: Callable[[str], Path | None], load: Callable[[str, Path], KernelLibrary]
) -> KernelChoice:
    """Return the fastest library that the processor can run, that is built, and that computes what it should.

    `wanted` is a variant, which alone is looked at, or "auto". `flags` are the processor's; `find` says where a
    variant's library lies; `load` loads and checks it, or raises `KernelError`.
    """
    notes: list[str] = []
    for variant in AUTOMATIC if wanted == "auto" else (wanted,):
        if missing := lacking(variant, flags):
            if wanted == variant:
                notes.append(f"{variant} kernels need {', '.join(missing)} of the processor")
            continue
        path = find(variant)
        if path is None:
            notes.append(f"{variant} kernels are not built ({NOT_BUILT})")
            continue
        try:
            library = load(variant, path)
        except KernelError as error:
            notes.append(str(error))
            continue
        return KernelChoice(library, "; ".join([f"{variant} kernels", *notes]))
    if not notes and not lacking("neon", flags):
        notes.append("those for ARM have not been measured (--cpu-kernels neon takes them)")
    elif not notes:
        notes.append("the processor has neither AMX, nor AVX-512 with bfloat16, nor AVX2 with FMA")
    return KernelChoice(None, "torch, since " + "; ".join(notes))


def load_checked(variant: str, path: Path) -> KernelLibrary:
    """Load and check a library. Raises `KernelError`.

    AMX is tried in a process of its own first: an instruction that faults would take this one along.
    """
    if variant == "amx":
        _try_apart(path)
    library = KernelLibrary(path)
    check(library)
    return library


def _try_apart(path: Path) -> None:
    command = [sys.executable, "-m", "services.engine.native.kernels.self_check", str(path)]
    root = Path(__file__).parents[4]  # where `services` is found
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{path.name} could not be tried: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise KernelError(f"{path.name} failed its trial: {said[0]}")
