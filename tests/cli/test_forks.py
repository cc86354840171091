"""The fork server: its children are what `python -m` would have made, sooner, and nobody outlives the launcher."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.cli.up.forks import WORKER_MODULES, Forks
from services.cli.up.spec import ChildSpec
from services.cli.up.supervise import Child, ChildFailed
from services.engine.choice import modules_of
from tests.waiting import until

TIMEOUT_S = 180.0
ENVIRON = {**os.environ, "TANDEM_LAUNCHER": "1", "PYTHONUNBUFFERED": "1", "OF_THIS_CHILD": "yes"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nobody forks with torch loaded elsewhere")


@dataclass
class Lines:
    """A display that keeps the lines, and tells who waits for one."""

    lines: list[str] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def line(self, name: str, text: str) -> None:
        self.lines.append(text)
        self.arrived.set()

    def phase(self, name: str, phase: str, fraction: float | None = None, about: str = "") -> None:
        pass

    def settled(self) -> None:
        pass

    async def until(self, text: str) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not any(text in line for line in self.lines):
                self.arrived.clear()
                await self.arrived.wait()

    @property
    def facts(self) -> dict[str, Any]:
        """What the program said of itself at last."""
        said: dict[str, Any] = json.loads([line for line in self.lines if line.startswith("{")][-1])
        return said


@pytest.fixture
async def server() -> AsyncIterator[Forks]:
    server = Forks((), os.environ)
    yield server
    server.close()


def spec(*arguments: str, cores: tuple[int, ...] = (), environ: dict[str, str] = ENVIRON) -> ChildSpec:
    argv = (sys.executable, "-m", "tests.cli.forked_program", *arguments)
    return ChildSpec("decode-0", argv, environ, cores, is_forked=True)


async def outcome(forks: Forks | None, *arguments: str) -> tuple[str, Lines]:
    """How the program ended, and what it said."""
    shown = Lines()
    child = Child(spec(*arguments), shown, forks, delay_s=lambda num_failures: 3600.0)
    running = asyncio.create_task(child.run())
    await shown.until("starting it again")
    await child.stop()
    await running
    return shown.lines.pop(), shown


@pytest.mark.parametrize("how", ["0", "3", "raise", "killed"])
async def test_a_forked_program_ends_as_one_that_was_started_by_itself(server: Forks, how: str) -> None:
    apart, apart_said = await outcome(None, how)
    forked, said = await outcome(server, how)
    assert forked == apart
    if how == "raise":
        assert said.lines[-1] == apart_said.lines[-1] == "ValueError: the fork in the road"


async def test_a_forked_program_sees_what_one_sees_that_was_started_by_itself(server: Forks) -> None:
    core = min(os.sched_getaffinity(0))
    seen = []
    for forks in (None, server, server):
        shown = Lines()
        child = Child(spec("wait", "--flag", os.fsdecode(b"mod\xe9l"), cores=(core,)), shown, forks)
        running = asyncio.create_task(child.run())
        await shown.until("argv")
        await child.stop()
        await running
        seen.append(shown.facts)
    apart, first, second = seen
    own = ("draws", "modules", "parent")
    assert not set(first["draws"]) & set(second["draws"])
    for facts in seen:
        for name in own:
            del facts[name]
    assert first == second == apart
    assert first["environ"]["OF_THIS_CHILD"] == "yes"
    assert first["cores"] == [core]


async def test_what_the_server_has_in_its_environment_no_child_sees() -> None:
    server = Forks((), {**os.environ, "OF_THE_LAUNCHER": "secret"})
    _, said = await outcome(server, "0")
    server.close()
    assert "OF_THE_LAUNCHER" not in said.facts["environ"]
    assert "OPENBLAS_NUM_THREADS" not in said.facts["environ"]


async def test_a_forked_program_that_is_killed_is_forked_again(server: Forks, tmp_path: Path) -> None:
    shown = Lines()
    child = Child(spec("once", str(tmp_path / "marker")), shown, server, delay_s=lambda num_failures: 0.0)
    running = asyncio.create_task(child.run())
    await shown.until("second life")
    assert "was killed by SIGKILL (out of memory?); starting it again in 0 s" in shown.lines
    assert shown.facts["parent"] == server.pid
    await child.stop()
    await running


async def test_a_stop_does_not_wait_for_the_server_to_have_loaded(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import signal\nsignal.pause()\n")
    server = Forks(["endless"], {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    child = Child(spec("wait"), Lines(), server)
    running = asyncio.create_task(child.run())
    await asyncio.sleep(0)
    async with asyncio.timeout(TIMEOUT_S):
        await child.stop()
        await running
    server.close()


async def test_orders_that_fill_the_socket_while_the_server_loads_all_arrive(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)\n".format(tmp_path / "go")
    )
    server = Forks(["slow"], {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    large = ENVIRON | {f"LARGE_{number}": "x" * 100_000 for number in range(5)}
    shown = [Lines() for _ in range(6)]
    children = [Child(spec("wait", str(number), environ=large), shown[number], server) for number in range(6)]
    running = [asyncio.create_task(child.run()) for child in children]
    (tmp_path / "go").touch()
    for number, child in enumerate(children):
        await shown[number].until("argv")
        assert (shown[number].facts["argv"][1], shown[number].facts["parent"]) == (str(number), server.pid)
        await child.stop()
    await asyncio.gather(*running)
    server.close()


async def test_a_server_that_hangs_holds_up_neither_a_stop_nor_a_kill(server: Forks) -> None:
    hung = Forks((), os.environ)
    for forks, ends in ((server, lambda child: child.stop(grace_s=0.1)), (hung, lambda child: _kill(child))):
        child = Child(spec("wait"), shown := Lines(), forks)
        running = asyncio.create_task(child.run())
        await shown.until("argv")
        os.kill(forks.pid, signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            await ends(child)
            await running
    hung.close()


async def _kill(child: Child) -> None:
    child.kill()


async def test_a_server_that_dies_takes_its_children_along_and_the_next_one_forks_them_again(server: Forks) -> None:
    """As often as that happens: a launcher runs for months."""
    shown = [Lines(), Lines()]
    children = [Child(spec("wait"), each, server, delay_s=lambda num_failures: 0.0) for each in shown]
    running = [asyncio.create_task(child.run()) for child in children]
    for _ in range(2):
        for each in shown:
            await each.until("argv")
            assert each.facts["parent"] == server.pid
            each.lines.clear()
        os.kill(server.pid, signal.SIGKILL)
        for each in shown:
            await each.until("was killed by SIGKILL")
    for each in shown:
        await each.until("argv")
        assert each.facts["parent"] == server.pid
        assert not any("starting without it" in line for line in each.lines)
    for child in children:
        await child.stop()
    await asyncio.gather(*running)


async def test_a_server_that_dies_before_it_has_forked_anything_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)\n".format(tmp_path / "go")
    )
    (tmp_path / "go").touch()
    server = Forks(["slow"], {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    child = Child(spec("wait"), shown := Lines(), server, delay_s=lambda num_failures: 0.0)
    running = asyncio.create_task(child.run())
    await shown.until("argv")
    (tmp_path / "go").unlink()
    first, shown.lines = server.pid, []
    os.kill(first, signal.SIGKILL)
    await shown.until("starting it again")
    await until(lambda: server.pid != first)
    os.kill(server.pid, signal.SIGKILL)  # before it has forked: another one would end like it
    await shown.until("starting without it")
    await shown.until("argv")
    assert shown.facts["parent"] not in (first, server.pid)
    await child.stop()
    await running
    server.close()


async def test_where_no_other_server_can_be_started_children_are_started_without_one(
    server: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their end was told to nobody: a launcher whose fork server had died for want of memory waited for ever."""

    def start(self: Forks) -> None:
        raise BlockingIOError(11, "no process can be made")

    child = Child(spec("wait"), shown := Lines(), server, delay_s=lambda num_failures: 0.0)
    running = asyncio.create_task(child.run())
    await shown.until("argv")
    lost, shown.lines = server.pid, []
    monkeypatch.setattr(Forks, "_start", start)
    os.kill(lost, signal.SIGKILL)
    await shown.until("was killed by SIGKILL")
    await shown.until("starting without it")
    await shown.until("argv")
    assert shown.facts["parent"] != lost
    await child.stop()
    await running


async def test_a_server_that_cannot_load_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')\n")
    server = Forks(["broken"], {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    _, said = await outcome(server, "3")
    server.close()
    assert "the fork server has ended: starting without it" in said.lines


@pytest.mark.parametrize("engine", ["native", pytest.param("vllm", marks=pytest.mark.vllm)])
async def test_loading_what_workers_need_starts_no_thread_and_opens_nothing(engine: str) -> None:
    """A thread would be missing in each child, and what is open would be shared; CUDA cannot be used after a fork."""
    modules = (*WORKER_MODULES, *modules_of(engine))
    bare, loaded = Forks((), os.environ), Forks(modules, os.environ)
    _, of_bare = await outcome(bare, "0")
    _, of_loaded = await outcome(loaded, "0")
    bare.close()
    loaded.close()
    assert of_loaded.facts["num_threads"] == 1
    assert of_loaded.facts["descriptors"] == of_bare.facts["descriptors"]
    assert {*modules, "torch", "grpc"} <= set(of_loaded.facts["modules"])
    assert not {"ucxx", "nixl_cu12"} & set(of_loaded.facts["modules"])
    assert engine == "vllm" or "torch._dynamo" not in of_loaded.facts["modules"]


async def test_a_program_that_cannot_be_imported_says_so_in_its_own_output(server: Forks) -> None:
    missing = ChildSpec("decode-0", (sys.executable, "-m", "tests.cli.no_such_program"), ENVIRON, is_forked=True)
    with pytest.raises(ChildFailed, match="no_such_program"):
        await Child(missing, Lines(), server).run()


def test_no_forked_child_outlives_a_launcher_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=ENVIRON) as launcher:
        assert launcher.stdout is not None
        descriptors = [os.pidfd_open(int(pid)) for pid in launcher.stdout.readline().split()]
        launcher.kill()
    try:
        asyncio.run(wait_until_gone(descriptors))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def wait_until_gone(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, gone.set)
        await asyncio.wait_for(gone.wait(), TIMEOUT_S)
        asyncio.get_running_loop().remove_reader(descriptor)


LAUNCHER = textwrap.dedent(
    """
    import asyncio, os, sys
    from services.cli.up.console import PlainDisplay
    from services.cli.up.forks import Forks
    from services.cli.up.supervise import Child
    from tests.cli.test_forks import spec

    async def main(forks):
        child = Child(spec("wait"), PlainDisplay([], sys.stderr), forks)
        running = asyncio.create_task(child.run())
        await child.ready.wait()
        print(child.pid, forks.pid, flush=True)
        await running

    asyncio.run(main(Forks((), os.environ)))
    """
)
