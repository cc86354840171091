"""The kernels under test are built from the sources here, every variant that this machine can run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from services.engine.cpu_kernels import REQUIRED_FLAGS
from services.engine.native.build import KERNEL_SOURCES, kernel_flags, variants
from services.engine.native.kernels.choice import load_checked
from services.engine.native.kernels.library import KernelError, KernelLibrary
from services.machine import processor_flags

# The tile instructions in plain C, beside this file.
EMULATED_AMX = (
    "-march=x86-64",
    "-mno-avx512f",
    "-DTANDEM_EMULATE_AMX",
    f"-I{Path(__file__).parent}",
    f"-I{KERNEL_SOURCES}",
)
STALLED = "portable, helpers fall asleep"
# What is tested: the library's variant, and flags beside its own.
BUILDS = {
    "portable": ("portable", ()),
    "amx-emulated": ("amx", EMULATED_AMX),
    "neon": ("neon", ()),
    "avx2": ("avx2", ()),
    "avx512": ("avx512", ()),
    "amx": ("amx", ()),
    STALLED: ("portable", ("-DTANDEM_STALL_HELPERS",)),
}

Libraries = Callable[[str], KernelLibrary]


def runs_here(name: str) -> bool:
    """Whether the processor has the instructions; the emulated one is for what AMX could be on."""
    return BUILDS[name][0] in variants() and REQUIRED_FLAGS.get(name, frozenset()) <= processor_flags()


RUNNABLE = [name for name in BUILDS if name != STALLED and runs_here(name)]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """Builds and loads a library by its name in `BUILDS`, once. Sanitizers come by TANDEM_KERNEL_TEST_FLAGS.

    A library that would not be chosen here, because it fails its check at start, is not tested further.
    """
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # what one process of the run has built serves the others
        directory = directory.parent
    (directory := directory / "kernels").mkdir(exist_ok=True)
    compiler = shutil.which("gcc")

    @cache
    def get(name: str) -> KernelLibrary:
        if compiler is None:
            pytest.skip("no gcc: the kernels cannot be built here, and torch computes")
        variant, flags = BUILDS[name]
        path = directory / f"{name}.so"
        extra = os.environ.get("TANDEM_KERNEL_TEST_FLAGS", "").split()
        command = [compiler, *kernel_flags(variant), *flags, "-Werror", *extra, "-shared", "-fPIC"]
        if not path.exists():
            unfinished = directory / f"{name}.{os.getpid()}"
            subprocess.run(
                [*command, "-o", unfinished, KERNEL_SOURCES / f"{variant}.c", "-lm"], check=True, timeout=300
            )
            unfinished.replace(path)
        try:
            return load_checked(name, path)
        except KernelError as error:
            if name != "amx":
                raise
            pytest.skip(f"not chosen here: {error}")

    return get


@pytest.fixture(params=RUNNABLE)
def library(request: pytest.FixtureRequest, libraries: Libraries) -> KernelLibrary:
    """Each variant that this machine can run."""
    return libraries(request.param)
