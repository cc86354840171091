"""The engine's thread: commands between steps, in order; a crash reaches everybody who waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from kvstore.threads import OsThreads, Threads
from services.engine.api import StepOutput
from services.worker import engine_thread
from services.worker.engine_thread import EngineCrashed, EngineThread
from tests.loop_threads import LoopThreads


@dataclass
class ScriptedEngine:
    """Computes nothing: counts steps while there is work."""

    num_steps_left: int = 0
    fails_in_step: bool = False
    log: list[str] = field(default_factory=list)
    in_step: threading.Event = field(default_factory=threading.Event)
    may_finish: threading.Event = field(default_factory=threading.Event)
    changes: list[tuple[bytes, bool]] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return self.num_steps_left > 0

    def when_lost(self, tell: Callable[[], None]) -> None:
        self.lose = tell

    def step(self, on_begun: object) -> StepOutput:
        self.log.append("step")
        self.in_step.set()
        assert self.may_finish.wait(60)
        if self.fails_in_step:
            raise RuntimeError("the step burst")
        self.num_steps_left -= 1
        return StepOutput(num_tokens=1)

    def take_host_changes(self) -> list[object]:
        return []

    def take_cache_changes(self) -> list[tuple[bytes, bool]]:
        changes, self.changes = self.changes, []
        return changes

    def work(self, num_steps: int) -> str:
        self.log.append("work")
        self.num_steps_left = num_steps
        return "done"


def until_true(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


class Listener:
    def on_begun(self, request: object) -> None: ...

    def on_step(self, output: StepOutput) -> None: ...


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def thread(engine: ScriptedEngine) -> AsyncIterator[EngineThread]:
    running = EngineThread(engine, OsThreads())  # type: ignore[arg-type]
    running.start(Listener())
    yield running
    engine.may_finish.set()
    await running.stop()


async def test_a_call_runs_on_the_engines_thread_and_returns_its_result(
    engine: ScriptedEngine, thread: EngineThread
) -> None:
    assert await thread.call(threading.get_ident) != threading.get_ident()
    assert await thread.call(engine.work, 0) == "done"


async def test_what_a_call_raises_is_its_callers_and_does_no_harm(thread: EngineThread) -> None:
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)
    assert await thread.call(lambda: "alive") == "alive"


async def test_calls_run_between_steps_and_in_order(engine: ScriptedEngine, thread: EngineThread) -> None:
    await thread.call(engine.work, 2)
    assert await asyncio.to_thread(engine.in_step.wait, 60)
    first, second = thread.call(engine.log.append, "first"), thread.call(engine.log.append, "second")
    engine.may_finish.set()
    await asyncio.gather(first, second)
    assert engine.log[:4] == ["work", "step", "first", "second"]


async def test_a_cancelled_call_runs_all_the_same(engine: ScriptedEngine, thread: EngineThread) -> None:
    await thread.call(engine.work, 1)
    assert await asyncio.to_thread(engine.in_step.wait, 60)
    call = thread.call(engine.log.append, "ran")
    call.cancel()
    engine.may_finish.set()
    await thread.call(lambda: None)
    assert "ran" in engine.log


async def test_a_crash_fails_pending_and_later_calls(engine: ScriptedEngine, thread: EngineThread) -> None:
    engine.fails_in_step = True
    await thread.call(engine.work, 1)
    assert await asyncio.to_thread(engine.in_step.wait, 60)
    pending = thread.call(lambda: "never")
    engine.may_finish.set()
    with pytest.raises(EngineCrashed, match="the step burst"):
        await pending
    assert isinstance(await thread.crashed, RuntimeError)
    with pytest.raises(EngineCrashed, match="the step burst"):
        await thread.call(lambda: "never")


async def test_an_idle_engine_that_loses_what_computes_for_it_crashes_at_once(
    engine: ScriptedEngine, thread: EngineThread
) -> None:
    await thread.call(lambda: None)
    engine.fails_in_step, engine.num_steps_left = True, 1
    engine.may_finish.set()
    await asyncio.to_thread(engine.lose)
    assert str(await asyncio.wait_for(asyncio.shield(thread.crashed), 60)) == "the step burst"
    with pytest.raises(EngineCrashed):
        await thread.call(lambda: None)


async def test_the_thread_has_work_while_it_steps_and_gets_on_with_each_step(
    engine: ScriptedEngine, thread: EngineThread
) -> None:
    await thread.call(lambda: None)
    await asyncio.to_thread(until_true, lambda: not thread.watch.has_work())
    await thread.call(engine.work, 2)
    assert await asyncio.to_thread(engine.in_step.wait, 60)
    before = thread.watch.num_advances
    thread.post(lambda: None)
    assert thread.watch.has_work()
    assert thread.watch.num_advances == before, "a step that hangs is no progress, whatever waits for it"
    engine.may_finish.set()
    await asyncio.to_thread(until_true, lambda: not thread.watch.has_work())
    assert thread.watch.num_advances > before


async def test_an_error_that_nobody_waits_for_is_not_lost(
    thread: EngineThread, caplog: pytest.LogCaptureFixture
) -> None:
    thread.post(lambda: 1 // 0)
    await thread.call(lambda: None)
    assert "ZeroDivisionError" in caplog.text


async def test_a_call_after_the_end_does_not_wait_for_ever(engine: ScriptedEngine, thread: EngineThread) -> None:
    await thread.stop()
    with pytest.raises(EngineCrashed, match="has stopped"):
        await thread.call(lambda: None)


async def test_commands_that_pile_up_during_a_step_are_seen(
    engine: ScriptedEngine, thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_thread, "_MAX_COMMANDS", 2)
    await thread.call(engine.work, 1)
    assert await asyncio.to_thread(engine.in_step.wait, 60)
    assert not thread.is_behind
    thread.post(engine.log.append, "first")
    thread.post(engine.log.append, "second")
    assert thread.is_behind
    engine.may_finish.set()
    await thread.call(lambda: None)
    assert not thread.is_behind


@pytest.mark.parametrize("threads", [OsThreads(), LoopThreads()], ids=["thread", "loop"])
async def test_cache_changes_reach_the_loop(engine: ScriptedEngine, threads: Threads) -> None:
    heard: asyncio.Queue[list[tuple[bytes, bool]]] = asyncio.Queue()
    thread = EngineThread(engine, threads)  # type: ignore[arg-type]
    thread.cache_followers.append(heard.put_nowait)
    thread.start(Listener())
    await thread.call(engine.changes.append, (b"block", True))
    assert await heard.get() == [(b"block", True)]
    await thread.stop()
