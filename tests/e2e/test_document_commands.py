"""The commands in the documents do what the reader is promised: each is run, against a live stack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.documents import COMMANDS, ROOT, CodeBlock, code_blocks
from tests.peers import PEER_SECRET
from tests.stack import Stack

DEMO_MODEL = ROOT / "services" / "cli" / "demo_model" / "tandem-demo"
ROUTER = "127.0.0.1:8000"
WORKER = "127.0.0.1:9100"
"""Where the documents say that the router and a decode worker's HTTP port are."""
RUN = [block for block in code_blocks() if block.language in COMMANDS and not block.reason_not_to_run]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack]) -> Iterator[Stack]:
    with new_stack(DEMO_MODEL, "--served-model-name tandem-demo", prefill=[""]) as stack:
        yield stack


def as_it_is_here(text: str, stack: Stack) -> str:
    """The commands with this stack's addresses, this environment's programs, and a curl that fails when HTTP does."""
    text = text.replace(ROUTER, stack.url.removeprefix("http://"))
    text = text.replace(WORKER, stack.services["decode-0"].debug_url.removeprefix("http://"))
    text = text.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    return re.sub(r"\bcurl ", "curl --fail-with-body -sS ", text)


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_command_of_the_documents_succeeds(block: CodeBlock, stack: Stack, tmp_path: Path) -> None:
    text = as_it_is_here(block.text, stack)
    argv = ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else [sys.executable, "-c", text]
    environ = {
        **os.environ,
        "TANDEM_PEER_SECRET": PEER_SECRET,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.strip(), f"{block} shows something"
