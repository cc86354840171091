"""`tandem up` itself, in a terminal and into a file: what its user sees, and that Ctrl-C is never a traceback."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "services.cli.main", "up", "--port", "0"]
TIMEOUT_S = 180.0
WIDTH = 80
CTRL_C = b"\x03"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
URL = r"Tandem serves tandem-demo at (http://\S+)/v1 \(1 prefill, 1 decode; Ctrl-C stops it\)"


@dataclass
class Terminal:
    """A terminal of 80 columns, and the program that runs in it."""

    process: subprocess.Popen[bytes]
    keyboard: int
    raw: bytes = field(default=b"")

    @property
    def text(self) -> str:
        """All that was ever written, without colours, movements of the cursor, and the terminal's echo of the keys."""
        return _ESCAPES.sub("", self.raw.decode(errors="replace")).replace("\r", "\n").replace("^C", "")

    def read(self, timeout_s: float) -> bool:
        """Take in what is there; False at the end."""
        if select.select([self.keyboard], [], [], timeout_s)[0]:
            try:
                piece = os.read(self.keyboard, 1 << 16)
            except OSError:  # EIO: nobody has the other end any more
                return False
            self.raw += piece
            return bool(piece)
        return True

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline_s = time.monotonic() + TIMEOUT_S
        while (found := re.search(pattern, self.text)) is None:
            assert self.read(timeout_s=1.0) or re.search(pattern, self.text), f"{pattern!r} is not in:\n{self.text}"
            assert time.monotonic() < deadline_s, f"{pattern!r} is not in:\n{self.text}"
        return found

    def press(self, *keys: bytes) -> None:
        for key in keys:
            os.write(self.keyboard, key)

    def wait(self) -> int:
        """The exit status, with all that was written."""
        while self.read(timeout_s=TIMEOUT_S):
            pass
        return self.process.wait(TIMEOUT_S)


@contextmanager
def terminal(*flags: str) -> Iterator[Terminal]:
    keyboard, screen = pty.openpty()
    termios.tcsetwinsize(screen, (30, WIDTH))
    environ = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [*COMMAND, *flags],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        env=environ,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal to it
    )
    os.close(screen)
    try:
        yield Terminal(process, keyboard)
    finally:
        process.kill()  # and with it, by the kernel, whatever it has started
        process.wait()
        os.close(keyboard)


def test_a_terminal_shows_each_process_with_its_phase_and_the_url_last() -> None:
    with terminal() as shown:
        shown.wait_for(r"^tandem    \| starting tandem-demo: 1 prefill, 1 decode\n")
        for name in ("router", "prefill-0", "decode-0"):
            shown.wait_for(rf"{name:<9} \| (starting|importing|loading model|warming up|registered)")
        url = shown.wait_for(URL)[1]
        before = shown.text.partition("Tandem serves")[0]
        last_frame = [row for row in before.splitlines() if row][-3:]
        assert [re.split(r" +\| +| {2,}", row)[:2] for row in last_frame] == [
            ["router", "ready"], ["prefill-0", "ready"], ["decode-0", "ready"],
        ]  # fmt: skip
        assert all(len(row) <= WIDTH for row in last_frame)
        body = json.dumps({"model": "tandem-demo", "prompt": "Hello", "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        assert urllib.request.urlopen(request, timeout=60).status == 200
        shown.press(CTRL_C)
        assert shown.wait() == 0
    after = shown.text.partition("Ctrl-C stops it")[2]
    assert "INFO" not in shown.text, "neither chatter nor single requests"
    assert after.rstrip().endswith("tandem    | stopped")
    assert "Traceback" not in shown.text
    assert shown.raw.count(b"\x1b[?25h") >= shown.raw.count(b"\x1b[?25l"), "the cursor is back"


@pytest.mark.parametrize("phase", [r"tandem    \| starting", r"prefill-0 \| starting", r"decode-0  \| importing"])
def test_ctrl_c_twice_while_it_starts_ends_it_without_a_traceback(phase: str) -> None:
    with terminal() as shown:
        shown.wait_for(phase)
        shown.press(CTRL_C, CTRL_C)
        assert shown.wait() == 0
    assert shown.text.rstrip().endswith("tandem    | stopped")
    assert "Traceback" not in shown.text
    assert "Tandem serves" not in shown.text


def test_into_a_file_go_plain_lines_wherever_it_is_started(tmp_path: Path) -> None:
    """Here, where packages lie that have the names of its own."""
    for name in ("services", "kvstore", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not that one')\n")
    log, out = tmp_path / "log", tmp_path / "out"
    command = [COMMAND[0], "-P", *COMMAND[1:], "--colocated"]
    with log.open("w") as errors, out.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=tmp_path)
        try:
            deadline_s = time.monotonic() + TIMEOUT_S
            while not re.search(r"Tandem serves .* Try:\n\ncurl .*\n", out.read_text()):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()
    lines = log.read_text().splitlines()
    assert "\x1b" not in log.read_text() + out.read_text()
    assert lines[0] == "tandem   | starting tandem-demo: 0 prefill, 1 decode"
    assert lines[-1] == "tandem   | stopped"
    of_worker = [line.removeprefix("decode-0 | ") for line in lines if line.startswith("decode-0 | ")]
    assert [phase for phase in of_worker if "%" not in phase][:3] == ["starting", "importing", "loading model"]
    assert of_worker[-1].startswith("ready: http://127.0.0.1:")
