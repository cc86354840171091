"""A minute of chaos, as `make chaos` deals it for ten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_faults_costs_no_client_an_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--minutes", "1", "--rate", "1.5"]
    run = subprocess.run(
        [*command, "--directory", str(tmp_path / "chaos")], cwd=_ROOT, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| right |" in run.stdout
