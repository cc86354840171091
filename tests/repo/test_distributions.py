"""Sdist and wheel are the whole of Tandem: built, looked into, installed, and served from outside the checkout."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import httpx
import pytest

from tests.documents import ROOT
from tests.ports import free_port

PACKAGES = ("kvstore", "loadtest", "services", "tandem")
PROMPT = "The code of amber is 4711. The code of cedar is 0952. What is the code of amber?"
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Distributions:
    sdist: Path
    wheel: Path

    def files_of_sdist(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive if member.isfile()}

    def files_of_wheel(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, str]:
    """An environment that knows nothing of the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TANDEM_"))}


@pytest.fixture(scope="module")
def built(tracked: set[str], elsewhere: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist of what is tracked, and the wheel made from that sdist, as `make dist` does."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    make_sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(output)!r})"
    _run([sys.executable, "-c", make_sdist], source, elsewhere)
    (sdist,) = output.iterdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    _run([*pip, "--wheel-dir", str(output), str(sdist)], source, elsewhere)
    (wheel,) = output.glob("*.whl")
    return Distributions(sdist, wheel)


def test_the_sdist_has_what_a_build_needs_and_no_tests(built: Distributions, tracked: set[str]) -> None:
    files = built.files_of_sdist()
    roots = tuple(f"{name}/" for name in ("kvstore", "loadtest", "services", "proto"))
    needed = {name for name in tracked if name.startswith(roots)}
    assert needed <= files, sorted(needed - files)
    assert {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"} <= files
    assert not [name for name in files if name.startswith(("tests/", "deploy/", "docs/"))]


def test_the_wheel_has_stubs_kernels_demo_model_and_licence(built: Distributions, tracked: set[str]) -> None:
    files = built.files_of_wheel()
    inside = {
        name.removeprefix("proto/") for name in tracked if name.startswith(tuple(f"{name}/" for name in PACKAGES))
    }
    inside |= {name.removeprefix("proto/") for name in tracked if name.startswith("proto/tandem/") and ".py" in name}
    assert inside <= files, sorted(inside - files)
    assert {name.partition("/")[0] for name in files} == {*PACKAGES, "tandem_serve-0.1.0.dist-info"}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"services/engine/native/kernels/_portable{suffix}" in files
    assert f"services/engine/native/sampling/_sampler{suffix}" in files
    assert f"kvstore/block/_row_sums{suffix}" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    with zipfile.ZipFile(built.wheel) as archive:
        metadata = Parser().parsestr(archive.read("tandem_serve-0.1.0.dist-info/METADATA").decode())
    assert metadata["Name"] == "tandem-serve"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"router", "worker", "store", "launcher", "all", "nixl", "loadtest"} <= set(
        metadata.get_all("Provides-Extra")
    )


def test_an_installed_wheel_serves_the_demo_model_far_from_the_checkout(
    built: Distributions, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    """In an environment of its own, which borrows all other packages."""
    _run([sys.executable, "-m", "venv", "--without-pip", "venv"], tmp_path, elsewhere)
    python = str(tmp_path / "venv/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    _run([*pip, str(built.wheel)], tmp_path, elsewhere)
    purelib = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path, elsewhere)
    # A path behind its own; what the .pth files there would do (an editable checkout!) is not done.
    (Path(purelib.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _serves(tmp_path, elsewhere)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_clean_environment_installs_everything_and_serves(
    built: Distributions, tmp_path: Path, elsewhere: dict[str, str], kind: str
) -> None:
    _run([sys.executable, "-m", "venv", "venv"], tmp_path, elsewhere)
    constraints = str(ROOT / "constraints.txt")
    pip = [str(tmp_path / "venv/bin/python"), "-m", "pip", "install", "--constraint", constraints]
    _run([*pip, f"{getattr(built, kind)}[all,nixl]"], tmp_path, elsewhere)
    _serves(tmp_path, elsewhere)


def _serves(root: Path, environ: dict[str, str]) -> None:
    """`tandem up` in the venv below `root` answers one request rightly, and ends on Ctrl-C."""
    work = root / "work"
    work.mkdir()
    programs = root / "venv/bin"
    where = "import kvstore, services, tandem; print(kvstore.__file__, services.__file__, tandem.__file__)"
    for path in _run([str(programs / "python"), "-c", where], work, environ).split():
        assert Path(path).is_relative_to(root / "venv"), path
    port = free_port()
    with (root / "log").open("w") as log:
        command = [str(programs / "tandem"), "up", "--port", str(port)]
        process = subprocess.Popen(command, cwd=work, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_ready(process, f"http://127.0.0.1:{port}/ready", root / "log")
            request = {"model": "tandem-demo", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=request, timeout=60)
            assert answer.status_code == 200, answer.text
            assert "4711" in answer.json()["choices"][0]["text"]
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"tandem up is not ready (status {process.poll()}):\n{log.read_text()[-4000:]}")


def _run(command: list[str], cwd: Path, environ: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
