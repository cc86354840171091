"""The locustfile under locust's own command: distributed over processes, and from the web UI."""

from __future__ import annotations

import signal
import subprocess
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from loadtest.figures import read_result
from tests.loadtest.stubs import TIMEOUT_S, read_json, start, stub_server
from tests.ports import free_port

_FILE = ("locust", "-f", "loadtest/locustfile.py")
_LOAD = ("--rate", "30", "--num-requests", "90", "--warmup-requests", "3")
_LOAD += ("--prompt-tokens", "20", "--output-tokens", "4", "--target-name", "stub")


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_one_master_and_two_workers_send_one_plan_and_give_one_result(tmp_path: Path) -> None:
    port = free_port()
    at_master = ("--master-port", str(port))
    with stub_server() as url, ExitStack() as processes:
        master = start(
            *_FILE, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port), "--headless",
            "--expect-workers", "2", "--host", url, "--result", str(tmp_path / "run.json"), *_LOAD,
        )  # fmt: skip
        processes.callback(end, master)
        for _ in range(2):
            processes.callback(end, start(*_FILE, "--worker", "--master-host", "127.0.0.1", *at_master))
        _, log = master.communicate(timeout=TIMEOUT_S)
        bodies = read_json(f"{url}/seen")["bodies"]
    assert master.returncode == 0, log
    result = read_result(tmp_path / "run.json")
    assert sorted(each.index for each in result.records) == list(range(93)), "every request once"
    assert all(each.ok for each in result.records)
    assert result.num_lost == 0
    assert isinstance(bodies, list)
    assert len({tuple(body["prompt"]) for body in bodies}) == 93, "no two workers sent the same prompt"


def test_a_worker_that_dies_is_missed_and_the_rest_is_kept(tmp_path: Path) -> None:
    port = free_port()
    with stub_server() as url, ExitStack() as processes:
        master = start(
            *_FILE, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port), "--headless",
            "--expect-workers", "2", "--host", url, "--result", str(tmp_path / "run.json"), *_LOAD, "--rate", "10",
        )  # fmt: skip
        processes.callback(end, master)
        workers = [
            start(*_FILE, "--worker", "--master-host", "127.0.0.1", "--master-port", str(port)) for _ in range(2)
        ]
        for worker in workers:
            processes.callback(end, worker)
        wait_for_arrivals(url, 10)
        workers[0].send_signal(signal.SIGKILL)
        _, log = master.communicate(timeout=TIMEOUT_S)
    assert master.returncode == 1, log
    result = read_result(tmp_path / "run.json")
    assert result.num_lost > 0
    assert any("went away" in note for note in result.notes)
    assert {each.index % 2 for each in result.records if each.scheduled_s > 8} in ({0}, {1}), "the other one went on"


def test_the_web_ui_shows_our_settings_and_runs_again_and_again(tmp_path: Path) -> None:
    port = free_port()
    page = f"http://127.0.0.1:{port}"
    with stub_server() as url, ExitStack() as processes:
        locust = start(
            *_FILE, "--web-host", "127.0.0.1", "--web-port", str(port), "--host", url,
            "--result", str(tmp_path / "run.json"), *_LOAD,
        )  # fmt: skip
        processes.callback(end, locust)
        form = wait_for_page(page)
        assert "burstiness" in form
        assert "goodput" in form
        for rate, number in (("40", 20), ("20", 10)):
            swarm(page, {"host": url, "rate": rate, "num_requests": str(number)})
            wait_for(tmp_path / "run.json", locust)
            result = read_result(tmp_path / "run.json")
            (tmp_path / "run.json").unlink()
            assert (len(result.records), result.options.rate) == (number + 3, float(rate))
        names = {(each["method"], each["name"]) for each in read_json(f"{page}/stats/requests")["stats"]}  # type: ignore[attr-defined]
        assert {("e2e", "short (≤ 512)"), ("ttft", "short (≤ 512)")} <= names


def wait_for_arrivals(url: str, number: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(read_json(f"{url}/seen")["arrivals"]) < number:  # type: ignore[arg-type]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_for_page(url: str) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                return str(response.read().decode())
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def swarm(page: str, fields: dict[str, str]) -> None:
    data = urllib.parse.urlencode({"user_count": "1", "spawn_rate": "1"} | fields).encode()
    with urllib.request.urlopen(f"{page}/swarm", data, timeout=TIMEOUT_S) as response:
        assert b"true" in response.read()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.3)
