"""Runs a `tandem up` on this machine for a benchmark: starts it, waits until it serves, stops it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_NUM_LINES_KEPT = 40


class StackFailed(Exception):
    """The stack did not come up; the message has its last lines."""


@dataclass(frozen=True)
class Stack:
    """A running `tandem up`. `debug_urls` are its workers' pages, by the workers' names."""

    name: str
    process: subprocess.Popen[str]
    url: str
    debug_urls: Mapping[str, str]


def start_stack(name: str, flags: Sequence[str]) -> Stack:
    """Starts it and waits for the line that prints its URL. Raises StackFailed."""
    command = [sys.executable, "-m", "services.cli.main", "up", "--port", "0", "--log-format", "text", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = _Output(process)
    if not output.settled.wait(_START_TIMEOUT_S) or not output.url:
        _stop(process)
        raise StackFailed(f"{name} did not come up:\n{''.join(output.last_lines)}")
    return Stack(name, process, output.url, dict(output.debug_urls))


def stop_stack(stack: Stack) -> None:
    _stop(stack.process)


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass
class _Output:
    """Reads in a thread all that the stack prints: else the pipe would fill and the stack stand still.

    `settled` is set when the stack serves, and when it has ended.
    """

    process: subprocess.Popen[str]
    url: str = ""
    debug_urls: dict[str, str] = field(default_factory=dict)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_NUM_LINES_KEPT))
    settled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.last_lines.append(line)
                if found := re.search(r"((?:decode|prefill)-\d+) +\| ready: (http://[^\s,]+)", line):
                    self.debug_urls[found[1]] = found[2]
                if found := re.search(r"Tandem serves .* at (http://\S+)/v1", line):
                    self.url = found[1]
                    self.settled.set()
        self.settled.set()
