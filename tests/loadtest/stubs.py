"""Starts stub servers and the load test's commands as processes, and stops what it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


@contextmanager
def stub_server(*flags: str) -> Iterator[str]:
    """A running stub server's URL."""
    command = [sys.executable, str(Path(__file__).with_name("stub_server.py")), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def start(*arguments: str) -> subprocess.Popen[str]:
    """`python -m ARGUMENTS` in the repository's root."""
    environment = os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'proto'}"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def loadtest(*arguments: str, status: int = 0) -> tuple[str, str]:
    """Runs `python -m loadtest`; returns what it printed, out and err, after checking its exit status."""
    with start("loadtest", *arguments) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == status, err
    return out, err


def read_json(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        page = json.load(response)
    assert isinstance(page, dict)
    return page
