"""The kernels for 64-bit ARM, compiled from the same sources and run in emulation: bits are the portable kernels'."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from services.engine.native.build import KERNEL_FLAGS, KERNEL_SOURCES
from services.engine.native.kernels.library import Epilogue
from tests.kernels.arm64_cases import Cases
from tests.kernels.conftest import Libraries

TOOLS = Path(__file__).parents[2] / "build" / "tools" / "arm64"
NAMES = ("aarch64-linux-gnu-gcc", "qemu-aarch64")


@pytest.fixture(scope="module")
def tools() -> dict[str, str]:
    """The cross compiler and the emulator: installed, or fetched by `make arm-tools`."""
    path = os.pathsep.join((os.environ["PATH"], str(TOOLS / "bin")))
    found = {name: shutil.which(name, path=path) for name in NAMES}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        lacking = f"{' and '.join(missing)} missing: `make arm-tools` fetches them"
        if os.environ.get("CI") == "true":
            pytest.fail(lacking)
        pytest.skip(lacking)
    return {name: str(place) for name, place in found.items()}


def test_kernels_for_arm_give_the_portable_bits(tools: dict[str, str], libraries: Libraries, tmp_path: Path) -> None:
    cases = Cases(libraries("portable"))
    for num_rows in (1, 2, 3, 4, 7, 33):
        for int8 in (False, True):
            cases.linear(num_rows, 41, 333, Epilogue.WRITE_FLOAT, int8=int8)
    for epilogue in Epilogue:
        cases.linear(5, 50, 129, epilogue, int8=False)
    cases.linear(5, 40, 2048, Epilogue.WRITE_FLOAT, int8=True, extreme=True)
    for head_dim, window in ((64, 0), (80, 40), (34, 0)):
        for int8 in (False, True):
            cases.attention([(150, 35), (21, 1), (129, 129)], head_dim, window, int8=int8)
    for size in (1, 100, 896):
        cases.norm(17, size)
    for head_dim in (34, 64):
        cases.append(37, head_dim)
        cases.append(37, head_dim, int8=True)

    compiler, emulator = (tools[name] for name in NAMES)
    driver, called, results = (tmp_path / name for name in ("driver", "cases", "results"))
    flags = [*KERNEL_FLAGS, "-DTANDEM_SOURCE_DIGEST=0u", "-Werror", f"-I{KERNEL_SOURCES}", "-static"]
    source = Path(__file__).parent / "arm64_driver.c"
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of our sanitizers
    subprocess.run([compiler, *flags, "-o", driver, source, "-lm"], env=environment, check=True, timeout=300)
    called.write_bytes(cases.file)
    subprocess.run([emulator, driver, called, results], env=environment, check=True, timeout=300)

    computed = results.read_bytes()
    for name, expected in cases.expected:
        ours = np.frombuffer(computed[: expected.nbytes], dtype=expected.dtype).reshape(expected.shape)
        assert np.array_equal(ours.view(np.uint8), expected.view(np.uint8)), name
        computed = computed[expected.nbytes :]
    assert not computed
