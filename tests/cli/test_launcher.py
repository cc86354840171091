"""The launcher with small fake services: start, readiness, restart, clean stop, and no child left behind."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import redis

from services.cli.embedded_redis import EmbeddedRedis
from services.cli.up.console import PlainDisplay, WhileRead
from services.cli.up.private_redis import keep_redis
from services.cli.up.spec import ChildSpec, Stack
from services.cli.up.stack import run_stack
from services.cli.up.supervise import (
    Child,
    ChildFailed,
    last_words,
)
from services.restarts import describe_exit, restart_delay_s
from tests.ports import free_port

TIMEOUT_S = 120.0
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

WORKER = """
import signal, sys, time
from services.logs import report_phase, report_ready
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), sys.exit(0)))
report_phase("weights", 0.5)
print("loaded", flush=True)
report_ready(http="127.0.0.1:1", about="fast kernels")
signal.pause()
"""

CRASHING = """
import pathlib, sys, signal
from services.logs import report_ready
marker = pathlib.Path(sys.argv[1])
report_ready()
if not marker.exists():
    marker.touch()
    print("boom", flush=True)
    sys.exit(3)
print("second life", flush=True)
signal.pause()
"""

STUBBORN = """
import signal
from services.logs import report_ready
signal.signal(signal.SIGTERM, signal.SIG_IGN)
report_ready()
while True: signal.pause()
"""

LEAVING = """
import pathlib, subprocess, sys, time
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)
"""

SHARING = """
import os, signal
from multiprocessing.shared_memory import SharedMemory
name = SharedMemory(create=True, size=64).name
if os.fork() == 0: signal.pause()
print(name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

STOPS_AFTER = """
import pathlib, signal, sys, time
directory, name, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
def stop(*_):
    (directory / f"{name}-stops").touch()
    while other and not (directory / f"{other}-stops").exists(): time.sleep(0.01)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(directory / f"{name}-runs").touch()
while True: signal.pause()
"""

FAILS_WHEN_THEY_RUN = """
import pathlib, sys, time
while len(list(pathlib.Path(sys.argv[1]).glob("*-runs"))) < 2: time.sleep(0.01)
sys.exit(4)
"""

ROUTER = """
import http.server, json, signal, sys
from services.logs import report_ready
port, status, *names = sys.argv[1:]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/debug/workers"
        print("listed", flush=True)
        self.answer(200, {"workers": [{"worker_id": name, "connected": True} for name in names]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked", body["model"], self.headers["Authorization"], flush=True)
        self.answer(int(status), {"error": {"message": "no"}})
    def answer(self, status, entry):
        body = json.dumps(entry).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: (print("router stops", flush=True), sys.exit(0)))
with http.server.HTTPServer(("127.0.0.1", int(port)), Handler) as server:
    report_ready()
    server.serve_forever()
"""


@dataclass
class Recorder:
    """A display that keeps what it is shown, and calls back on a line."""

    events: list[tuple[str, ...]] = field(default_factory=list)
    on_line: Callable[[str, str], None] = lambda name, text: None

    def line(self, name: str, text: str) -> None:
        self.events.append((name, text))
        self.on_line(name, text)

    def phase(self, name: str, phase: str, fraction: float | None = None, about: str = "") -> None:
        done = () if fraction is None else (f"{fraction:g}",)
        self.events.append((name, "phase", phase, *done, *filter(None, [about])))

    def settled(self) -> None:
        self.events.append(("settled",))


def spec(name: str, code: str, *arguments: str, cores: tuple[int, ...] = (), grace_s: float = 60.0) -> ChildSpec:
    environ = {**os.environ, "TANDEM_LAUNCHER": "1"}
    return ChildSpec(name, (sys.executable, "-c", code, *arguments), environ, cores, grace_s)


def stack(*workers: ChildSpec, connected: Sequence[str] = (), status: int = 200) -> Stack:
    """`connected`: whom the router has sessions with (default: all); `status`: its answer to the first request."""
    port = free_port()
    router = spec("router", ROUTER, str(port), str(status), *(connected or [worker.name for worker in workers]))
    return Stack(router, workers, "127.0.0.1", port, False, "m", api_key="k")


def stop_with(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


async def test_a_stack_starts_announces_itself_and_stops_router_first() -> None:
    shown = Recorder()
    status = await run_stack(
        stack(spec("prefill-0", WORKER), spec("decode-0", WORKER)), shown, TIMEOUT_S, stop_with(signal.SIGTERM)
    )
    assert status == 0
    about = "http://127.0.0.1:1, fast kernels"
    assert [event[1:] for event in shown.events if event[0] == "prefill-0"] == [
        ("phase", "starting"), ("phase", "weights", "0.5"), ("loaded",), ("phase", "ready", about), ("drained",),
    ]  # fmt: skip
    asked = shown.events.index(("router", "asked m Bearer k"))
    assert asked > shown.events.index(("decode-0", "phase", "ready", about))
    assert asked < shown.events.index(("router", "phase", "ready"))
    assert shown.events[-1] == ("tandem", "stopped")
    router_stops = shown.events.index(("router", "router stops"))
    assert router_stops < shown.events.index(("prefill-0", "drained"))
    assert router_stops < shown.events.index(("decode-0", "drained"))


async def test_a_worker_that_dies_at_its_start_stops_everything_with_its_last_lines() -> None:
    shown = Recorder()
    broken = spec("decode-0", "import sys; print('no such model'); sys.exit(4)")
    announced: list[str] = []
    status = await run_stack(
        stack(spec("prefill-0", WORKER), broken), shown, TIMEOUT_S, lambda: announced.append("ready")
    )
    assert status == 1
    assert announced == []
    assert shown.events[-1] == ("tandem", "decode-0 exited with status 4 before it was ready: no such model")
    assert ("decode-0", "phase", "failed") in shown.events
    assert ("prefill-0", "drained") not in shown.events


async def test_a_start_that_fails_waits_for_no_router_before_it_stops_the_workers(tmp_path: Path) -> None:
    """A worker must not go on loading for as long as the router takes to end."""
    shown, directory = Recorder(), str(tmp_path)
    router = spec("router", STOPS_AFTER, directory, "router", "prefill", grace_s=TIMEOUT_S)
    prefill = spec("prefill-0", STOPS_AFTER, directory, "prefill", "", grace_s=TIMEOUT_S)
    broken = spec("decode-0", FAILS_WHEN_THEY_RUN, directory)
    status = await run_stack(replace(stack(prefill, broken), router=router), shown, TIMEOUT_S, lambda: None)
    assert status == 1
    assert not any("killed" in text for event in shown.events for text in event), shown.events


async def test_a_stack_is_not_announced_before_the_router_has_a_session_with_every_worker() -> None:
    shown, announced = Recorder(), list[str]()
    workers = spec("prefill-0", WORKER), spec("decode-0", WORKER)

    def stop_when_looked_at_often(name: str, text: str) -> None:
        have_said = all((each.name, "phase", "weights", "0.5") in shown.events for each in workers)
        is_ready = ("prefill-0", "phase", "ready") in [event[:3] for event in shown.events]
        if have_said and is_ready and shown.events.count(("router", "listed")) > 5:
            os.kill(os.getpid(), signal.SIGINT)

    shown.on_line = stop_when_looked_at_often
    await run_stack(stack(*workers, connected=["prefill-0"]), shown, TIMEOUT_S, lambda: announced.append("announced"))
    assert announced == []
    ready = [event[0] for event in shown.events if event[1:3] == ("phase", "ready")]
    assert ready == ["prefill-0"]


async def test_a_stack_whose_first_request_fails_is_not_announced() -> None:
    shown, announced = Recorder(), list[str]()
    status = await run_stack(
        stack(spec("decode-0", WORKER), status=500), shown, TIMEOUT_S, lambda: announced.append("announced")
    )
    assert (status, announced) == (1, [])
    assert shown.events[-1] == ("tandem", "the first request failed: 500: no")


def test_the_last_words_are_the_end_of_a_traceback_or_the_message_of_a_record() -> None:
    assert last_words(["Traceback", "  in f", "ValueError: no", "", " "]) == "ValueError: no"
    assert last_words(["19:14:00.447 ERROR services.worker.process: cannot start: no"]) == "cannot start: no"
    assert last_words(['{"message": "broke", "exception": "Traceback\\nValueError: no\\n"}']) == "broke: ValueError: no"
    assert last_words(["[1]"]) == "[1]"
    assert last_words([]) == ""


async def test_a_stack_that_does_not_become_ready_in_time_is_stopped() -> None:
    shown = Recorder()
    sleeper = spec("decode-0", "import signal; signal.pause()")
    assert await run_stack(stack(sleeper), shown, 0.2, lambda: None) == 1
    assert ("tandem", "not ready within 0.2 s (--startup-timeout-s): decode-0") in shown.events


async def test_a_signal_during_the_start_stops_it() -> None:
    shown = Recorder()
    shown.on_line = lambda name, text: os.kill(os.getpid(), signal.SIGINT) if text == "loading" else None
    loading = spec("decode-0", "import signal; print('loading', flush=True); signal.pause()")
    assert await run_stack(stack(loading), shown, TIMEOUT_S, lambda: None) == 0


@pytest.fixture
def unignored_hangups() -> Iterator[None]:
    """As where the tests themselves do not run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("unignored_hangups")
async def test_a_stack_whose_output_nobody_reads_any_more_still_stops() -> None:
    """As after `tandem up | head`, or when the terminal is closed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with io.TextIOWrapper(io.FileIO(write_end, "w"), write_through=True) as unread:
        shown = WhileRead(PlainDisplay(["router", "decode-0"], unread))
        async with asyncio.timeout(TIMEOUT_S):
            status = await run_stack(
                stack(spec("decode-0", WORKER, grace_s=60.0)), shown, TIMEOUT_S, stop_with(signal.SIGHUP)
            )
    assert status == 0


async def test_a_stack_that_nohup_started_outlives_its_terminal() -> None:
    shown = Recorder()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def announced() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        assert await run_stack(stack(spec("decode-0", WORKER)), shown, TIMEOUT_S, announced) == 0
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert ("tandem", "SIGTERM: stopping; once more to stop at once") in shown.events


async def test_a_second_signal_kills_at_once() -> None:
    shown = Recorder()
    shown.on_line = lambda name, text: os.kill(os.getpid(), signal.SIGINT) if text == "router stops" else None
    stubborn = spec("decode-0", STUBBORN, grace_s=600)
    assert await run_stack(stack(stubborn), shown, TIMEOUT_S, stop_with(signal.SIGINT)) == 0


async def test_a_child_that_dies_later_is_started_again(tmp_path: Path) -> None:
    shown, second_life = Recorder(), asyncio.Event()
    shown.on_line = lambda name, text: second_life.set() if text == "second life" else None
    child = Child(spec("decode-0", CRASHING, str(tmp_path / "marker")), shown, delay_s=lambda num_failures: 0.0)
    running = asyncio.create_task(child.run())
    await asyncio.wait_for(second_life.wait(), TIMEOUT_S)
    await child.stop()
    await running
    assert ("decode-0", "exited with status 3; starting it again in 0 s") in shown.events


async def test_a_stop_ends_the_pause_before_a_restart(tmp_path: Path) -> None:
    shown, paused = Recorder(), asyncio.Event()
    shown.on_line = lambda name, text: paused.set() if "starting it again" in text else None
    child = Child(spec("decode-0", CRASHING, str(tmp_path / "marker")), shown, delay_s=lambda num_failures: 3600.0)
    running = asyncio.create_task(child.run())
    await asyncio.wait_for(paused.wait(), TIMEOUT_S)
    await child.stop()
    await asyncio.wait_for(running, TIMEOUT_S)


async def test_a_child_that_ignores_sigterm_is_killed_after_its_grace() -> None:
    shown = Recorder()
    child = Child(spec("decode-0", STUBBORN), shown)
    running = asyncio.create_task(child.run())
    await asyncio.wait_for(child.ready.wait(), TIMEOUT_S)
    await child.stop(grace_s=0.05)
    await asyncio.wait_for(running, TIMEOUT_S)
    assert ("decode-0", "did not stop within 0.05 s: killed") in shown.events


async def test_a_stop_before_the_process_is_there_stops_it_too() -> None:
    child = Child(spec("decode-0", WORKER), Recorder())
    running = asyncio.create_task(child.run())
    await asyncio.sleep(0)
    await child.stop()
    await asyncio.wait_for(running, TIMEOUT_S)


@needs_linux
async def test_what_a_child_leaves_running_goes_with_it(tmp_path: Path) -> None:
    descriptors: list[int] = []
    is_known = tmp_path / "known"

    def note(name: str, text: str) -> None:
        descriptors.append(os.pidfd_open(int(text)))
        is_known.touch()

    child = Child(spec("decode-0", LEAVING, str(is_known)), Recorder(on_line=note))
    with pytest.raises(ChildFailed):  # it would wait for the end of the output for ever, did `sleep` hold the pipe
        await asyncio.wait_for(child.run(), TIMEOUT_S)
    await wait_until_gone(descriptors[0])
    os.close(descriptors[0])


@needs_linux
async def test_shared_memory_of_a_child_that_is_killed_goes_with_it() -> None:
    shown = Recorder()
    with pytest.raises(ChildFailed, match="killed by SIGKILL"):
        await asyncio.wait_for(Child(spec("decode-0", SHARING), shown).run(), TIMEOUT_S)
    (name,) = [event[1] for event in shown.events if event[1].startswith("psm_")]
    assert name not in os.listdir("/dev/shm")


@needs_linux
async def test_a_child_is_pinned_to_its_cores() -> None:
    core = min(os.sched_getaffinity(0))
    shown = Recorder()
    child = Child(spec("decode-0", "import os; print(sorted(os.sched_getaffinity(0)))", cores=(core,)), shown)
    with pytest.raises(ChildFailed):
        await child.run()
    assert shown.events[1:] == [("decode-0", f"[{core}]")]


async def test_long_and_unfinished_lines_come_through() -> None:
    shown = Recorder()
    child = Child(spec("decode-0", "print('x' * 200_000); print('end', end='')"), shown)
    with pytest.raises(ChildFailed):
        await child.run()
    assert shown.events[1:] == [("decode-0", "x" * 200_000), ("decode-0", "end")]


@needs_linux
def test_no_child_outlives_a_launcher_that_is_killed() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, STUBBORN], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert launcher.stdout is not None
    with launcher.stdout:
        pid = int(launcher.stdout.readline())
        descriptor = os.pidfd_open(pid)
        launcher.kill()
        launcher.wait(TIMEOUT_S)
    try:
        asyncio.run(wait_until_gone(descriptor))
    finally:
        os.close(descriptor)


LAUNCHER = textwrap.dedent(
    """
    import asyncio, os, sys
    from services.cli.up.console import PlainDisplay
    from services.cli.up.spec import ChildSpec
    from services.cli.up.supervise import Child

    async def main():
        environ = {**os.environ, "TANDEM_LAUNCHER": "1"}
        child = Child(ChildSpec("decode-0", (sys.executable, "-c", sys.argv[1]), environ), PlainDisplay([], sys.stderr))
        running = asyncio.create_task(child.run())
        await child.ready.wait()
        print(child.pid, flush=True)
        await running

    asyncio.run(main())
    """
)


async def test_the_private_redis_is_started_again_on_its_port() -> None:
    shown, restarted = Recorder(), asyncio.Event()
    shown.on_line = lambda name, text: restarted.set()
    server = EmbeddedRedis.start()
    keeper = asyncio.create_task(keep_redis(server, shown))
    await asyncio.sleep(0)
    os.kill(server.pid, signal.SIGKILL)
    await asyncio.wait_for(restarted.wait(), TIMEOUT_S)
    await asyncio.sleep(0)  # the restart itself does not yield
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)


def test_pauses_before_restarts_double_and_are_bounded() -> None:
    assert [restart_delay_s(num) for num in (1, 2, 3, 4, 7, 99)] == [0, 1, 2, 4, 30, 30]


def test_exits_are_described_in_words() -> None:
    assert describe_exit(2) == "exited with status 2"
    assert describe_exit(-11) == "was killed by SIGSEGV"
    assert describe_exit(-9) == "was killed by SIGKILL (out of memory?)"


async def wait_until_gone(descriptor: int) -> None:
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, gone.set)
    await asyncio.wait_for(gone.wait(), TIMEOUT_S)
    loop.remove_reader(descriptor)
