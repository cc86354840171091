"""A little chaos, of the kind that `make chaos` deals for ten minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_faults_of_every_kind_cost_no_client_an_answer(tmp_path: Path) -> None:
    # Deadlines are three times as long, so that who waits for a processor among other tests is not taken for dead.
    # The seed is one whose first five faults are of five kinds, to five roles, and short, but for a stop that outlasts
    # the others' patience. Where nobody can be cut off, they are others.
    light = ["--minutes", "10", "--faults", "5", "--seed", "55375", "--rate", "1", "--cases", "6", "--patience", "3"]
    command = [sys.executable, "-m", "tests.chaos", *light, "--directory", str(tmp_path / "chaos")]
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=850)
    print(run.stdout)  # who could not be cut off, and what was dealt
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "chaos/report.json").read_text())
    assert report["outcomes"]["right"] > 5, run.stdout
    assert len(report["faults"]) == 5, run.stdout
