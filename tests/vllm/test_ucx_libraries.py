"""NIXL, ucxx and vLLM in one process, in whichever order: two builds of UCX that do not meet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("order", ["vllm nixl ucxx", "nixl ucxx vllm", "ucxx nixl vllm"])
def test_both_move_bytes_beside_vllm_and_share_no_settings(order: str) -> None:
    command = [sys.executable, "-m", "tests.vllm.ucx_process", *order.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "", "rendezvous settings of ucxx's would slow nixl down"
