"""`tandem up` itself, in a terminal and into a file: what its user sees, that Ctrl-C is never a traceback, and what it
does about a worker that hangs.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.held_threads import held, named

COMMAND = [sys.executable, "-m", "services.cli.main", "up", "--port", "0"]
TIMEOUT_S = 180.0
WIDTH = 80
CTRL_C = b"\x03"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STREAM = {
    "model": "tandem-demo", "prompt": "Say on.", "max_tokens": 60, "ignore_eos": True, "temperature": 0,
    "stream": True, "return_token_ids": True, "receipt": True,
}  # fmt: skip
PACE = {"origin": "a test", "base_s": 0.05, "prompt_token_s": 1e-5}
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


# The last: a worker's own phases, of which a busy machine's table may pass over one or the other.
@pytest.mark.parametrize(
    "phase", [r"tandem    \| starting", r"prefill-0 \| starting", r"decode-0  \| (importing|loading|warming up)"]
)
def test_ctrl_c_twice_while_it_starts_ends_it_without_a_traceback(phase: str) -> None:
    with terminal() as shown:
        shown.wait_for(phase)
        shown.press(CTRL_C, CTRL_C)
        assert shown.wait() == 0
    assert shown.text.rstrip().endswith("tandem    | stopped")
    assert "Traceback" not in shown.text


@pytest.mark.slow
def test_an_elastic_fleet_may_be_one_worker_that_does_all_by_itself() -> None:
    with terminal("--workers", "1", "--elastic", "--engine", "paced", "--num-gpu-blocks-override", "256") as shown:
        shown.wait_for(r"starting tandem-demo: 1 elastic: at first 0 prefill, 1 decode")
        url = shown.wait_for(r"Tandem serves tandem-demo at (http://\S+)/v1 \(1 elastic")[1]
        body = json.dumps({"model": "tandem-demo", "prompt": "Hello " * 200, "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        assert urllib.request.urlopen(request, timeout=60).status == 200
        shown.press(CTRL_C)
        assert shown.wait() == 0


@dataclass(frozen=True)
class IntoFile:
    """A `tandem up` that was told to write to files: two paced workers that do without others."""

    process: subprocess.Popen[bytes]
    log_path: Path
    url: str

    @property
    def lines(self) -> list[str]:
        return self.log_path.read_text().splitlines()

    def of(self, name: str) -> list[str]:
        """What one of its processes has said, or has had said of it."""
        return [line.partition(" | ")[2] for line in self.lines if line.startswith(name)]

    def page(self, name: str) -> str:
        """A worker's own page, of its latest start."""
        return [line.split()[1].rstrip(",") for line in self.of(name) if line.startswith("ready: ")][-1]

    def pid(self, name: str) -> int:
        (found,) = (each.pid for each in psutil.Process(self.process.pid).children(True) if each.name().endswith(name))
        return found


@pytest.fixture(scope="module")
def into_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IntoFile]:
    """Started where packages lie that have the names of its own."""
    directory = tmp_path_factory.mktemp("up")
    for name in ("services", "kvstore", "torch"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text("raise ImportError('not that one')\n")
    log, out, profile = directory / "log", directory / "out", directory / "profile.json"
    profile.write_text(json.dumps(dict.fromkeys(("prompt_pair_s", "running_s", "context_token_s"), 0) | PACE))
    flags = ["--colocated", "--decode", "2", "--engine", "paced", "--paced-profile", str(profile)]
    flags += ["--max-model-len", "512", "--num-gpu-blocks-override", "64", "--stuck-exit-s", "3"]
    command = [
        COMMAND[0],
        "-P",
        *COMMAND[1:],
        *flags,
        "--max-model-len",
        "512",
        "--num-gpu-blocks-override",
        "64",
        "--stuck-exit-s",
        "3",
    ]
    with log.open("w") as errors, out.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=directory)
        try:
            said = re.compile(r"Tandem serves .* at (\S+)/v1 .*Try:\n\ncurl .*\n", re.DOTALL)
            wait_for(lambda: process.poll() is not None or said.search(out.read_text()) is not None)
            found = said.search(out.read_text())
            assert found is not None, log.read_text()
            yield IntoFile(process, log, found[1])
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()
    assert log.read_text().splitlines()[-1] == "tandem   | stopped"
    assert "\x1b" not in log.read_text() + out.read_text()


def test_into_a_file_go_plain_lines_wherever_it_is_started(into_file: IntoFile) -> None:
    assert into_file.lines[0] == "tandem   | starting tandem-demo: 0 prefill, 2 decode"
    of_worker = into_file.of("decode-0")
    assert [phase for phase in of_worker if "%" not in phase][:2] == ["starting", "importing"]
    assert of_worker[-1].startswith("ready: http://127.0.0.1:")


def test_a_worker_whose_step_loop_hangs_is_left_with_its_streams_ends_by_itself_and_is_started_again(
    into_file: IntoFile,
) -> None:
    def get(url: str) -> httpx.Response:
        return httpx.get(url, timeout=TIMEOUT_S)

    def events() -> Iterator[dict[str, Any]]:
        with httpx.stream("POST", f"{into_file.url}/v1/completions", json=STREAM, timeout=TIMEOUT_S) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def is_serving(name: str) -> bool:
        metrics = get(f"{into_file.page(name)}/metrics").text
        return re.search(r"^vllm:num_requests_running{.*} 1\.0$", metrics, re.MULTILINE) is not None

    def answers(page: str) -> bool:
        try:
            return bool(httpx.get(f"{page}/ready", timeout=1).content)
        except httpx.ReadTimeout:
            return False

    @contextlib.contextmanager
    def held_without_the_interpreter(thread: int, page: str) -> Iterator[None]:
        """One that was stopped with Python's lock stops all others, which is another fault than this one."""
        while True:
            with held(thread):
                if answers(page):
                    yield
                    return

    def why_not_ready(page: str) -> str:
        while (answer := get(f"{page}/ready")).status_code == 200:
            time.sleep(0.02)
        return str(answer.json()["reason"])

    undisturbed = [token for event in events() for token in tokens_of(event)]
    assert len(undisturbed) == STREAM["max_tokens"]
    heard, receipt, victim = list[int](), dict[str, Any](), ""
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as hanging:
        for event in events():
            heard += tokens_of(event)
            receipt = event.get("receipt", receipt)
            if heard and not victim:
                (victim,) = filter(is_serving, ("decode-0", "decode-1"))
                engine = named(into_file.pid(victim), "engine")[0]
                hanging.enter_context(held_without_the_interpreter(engine, into_file.page(victim)))
                reason = pool.submit(why_not_ready, into_file.page(victim))
        assert heard == undisturbed
        assert reason.result(TIMEOUT_S) == "no progress of: step loop"
        (sequence,) = receipt["sequences"]
        assert (sequence["resumed_elsewhere"], len(sequence["resumes"])) == ("exact", 1)
        left = f"session with decode worker {victim} lost with 1 requests: the worker makes no progress: step loop"
        wait_for(lambda: any(line.endswith(left) for line in into_file.of("router")))  # by way of the launcher
        wait_for(lambda: "exited with status 3; starting it again in 0 s" in into_file.of(victim))
    wait_for(lambda: into_file.of(victim)[-1].startswith("ready: "))
    wait_for(lambda: all(each["connected"] for each in get(f"{into_file.url}/debug/workers").json()["workers"]))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def tokens_of(event: dict[str, Any]) -> list[int]:
    return [token for choice in event["choices"] for token in choice["token_ids"] or []]
