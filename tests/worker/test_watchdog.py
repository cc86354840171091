"""The watchdog: what it says and to whom, and how the process ends."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import subprocess
import sys
import time

import pytest

from kvstore.threads import OsThreads
from services.node import Watchdog, loop_watch
from services.node.watchdog import _Starvation
from services.progress import Watch
from services.startup import STUCK
from tests.loop_threads import LoopThreads


def seconds(number: float) -> list[float]:
    return [0.25 * i for i in range(int(number * 4) + 1)]


async def test_who_should_know_hears_of_a_standstill_and_of_its_end(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, ...]] = []
    watch = Watch("step_loop", lambda: True, lambda: 2.0)
    dog = Watchdog([watch], 60.0, LoopThreads(), heard.append, end=lambda status: pytest.fail("ended"))
    for now_s in seconds(3):
        dog.look(now_s)
    assert dog.stuck == "step loop"
    watch.advanced()
    dog.look(4.0)
    await asyncio.sleep(0)
    assert heard == [("step_loop",), ()]
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


async def test_what_stands_still_for_good_ends_the_process_and_says_where_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends: list[int] = []
    dog = Watchdog([Watch("step_loop", lambda: True, lambda: 2.0)], 5.0, LoopThreads(), lambda _: None, ends.append)
    for now_s in seconds(7):
        dog.look(now_s)
    assert ends == []
    dog.look(7.25)
    assert ends == [STUCK]
    assert "ending with status 3: no progress of step_loop" in caplog.text


async def test_a_process_may_be_told_never_to_end_itself() -> None:
    dog = Watchdog(
        [Watch("step_loop", lambda: True, lambda: 2.0)],
        0.0,
        LoopThreads(),
        lambda _: None,
        end=lambda status: pytest.fail("ended"),
    )
    for now_s in seconds(1000):
        dog.look(now_s)


async def test_a_look_that_breaks_is_said_once_and_ends_no_watch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    now_s, is_broken = itertools.count(0.0, 0.25), True
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))

    def has_work() -> bool:
        if is_broken:
            raise KeyError("a part that is gone")
        return True

    dog = Watchdog([Watch("step_loop", has_work, lambda: 2.0)], 0.0, LoopThreads(), lambda _: None)
    assert all(dog.turn() for _ in range(20))
    assert [record.message for record in caplog.records] == ["the watchdog cannot look, and tries on"]
    is_broken = False
    assert all(dog.turn() for _ in range(20))
    assert dog.stuck == "step loop"


async def test_a_look_that_outlasts_its_watchdog_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words come too late for whoever says them; that must not end a process that was about to end well."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    now_s = itertools.count(0.0, 0.25)
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    dog = Watchdog([Watch("step_loop", lambda: True, lambda: 2.0)], 0.0, OsThreads(), lambda _: None)
    dog.close()
    assert all(dog.turn() for _ in range(20))


async def test_who_waits_for_a_processor_is_asked_only_while_something_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    now_s, asked = itertools.count(0.0, 0.25), []
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    watch = Watch("step_loop", lambda: True, lambda: 2.0)
    dog = Watchdog([watch], 0.0, LoopThreads(), lambda _: None)
    monkeypatch.setattr(dog._starvation, "take_s", lambda: asked.append(None) or 0.25)
    for _ in range(20):
        watch.advanced()
        dog.turn()
    assert asked == []
    for _ in range(200):
        dog.turn()
    assert len(asked) == 200
    assert dog.stuck == ""  # since it waited all the time


async def test_a_loop_that_comes_round_gets_on_and_one_that_hangs_does_not() -> None:
    watch = loop_watch(2.0)
    dog = Watchdog([watch], 0.0, LoopThreads(), lambda _: None)
    for now_s in seconds(10):
        dog.look(now_s)
        await asyncio.sleep(0)
    assert dog.still_s() == {"event_loop": 0.0}
    for now_s in seconds(3):
        dog.look(10 + now_s)
    assert dog.stuck == "event loop"


_HANGS = """
import asyncio, sys, time
from kvstore.threads import OsThreads
from services.node import loop_watch, watched

def hang_in_the_loop():
    time.sleep(600)

async def main():
    async with watched([loop_watch(0.3)], 0.3, OsThreads(), lambda stuck: None):
        hang_in_the_loop()

asyncio.run(main())
"""


def test_a_process_whose_event_loop_hangs_ends_with_a_status_and_all_stacks() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=150, env=dict(os.environ), check=False
    )
    assert ended.returncode == STUCK
    assert "hang_in_the_loop" in ended.stderr


def test_threads_that_share_a_processor_wait_for_it() -> None:
    starvation = _Starvation()
    starvation.take_s()
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        # They inherit the one processor.
        spinning = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(3)]
        until_s = time.process_time() + 0.2
        while time.process_time() < until_s:
            pass
    finally:
        os.sched_setaffinity(0, allowed)
        for process in spinning:
            process.kill()
            process.wait()
    assert starvation.take_s() > 0.1
