"""A `tandem up` of this machine for a benchmark, and the figures that every table needs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Stack:
    """A running `tandem up`."""

    name: str
    process: subprocess.Popen[str]
    url: str
    debug_urls: tuple[str, ...]


def start_stack(name: str, flags: Sequence[str]) -> Stack:
    """Start it and wait for the line that prints its URL."""
    command = [sys.executable, "-m", "services.cli.main", "up", "--port", "0", "--log-format", "text", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    deadline = time.monotonic() + _START_TIMEOUT_S
    lines: list[str] = []
    debug_urls: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"decode-\S+ serves on .* debug (http://\S+?)\)?$", line):
            debug_urls.append(found[1])
        if found := re.search(r"Tandem serves .* at (http://\S+)/v1", line):
            return Stack(name, process, found[1], tuple(debug_urls))
        if time.monotonic() > deadline:
            break
    process.kill()
    raise RuntimeError(f"{name} did not come up:\n{''.join(lines[-20:])}")


def stop_stack(stack: Stack) -> None:
    stack.process.send_signal(signal.SIGINT)
    try:
        stack.process.communicate(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        stack.process.kill()


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
