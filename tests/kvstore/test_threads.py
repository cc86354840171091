"""Loops of their own: they come round, and their end is no secret."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from kvstore.threads import OsThreads
from tests.waiting import until


async def test_a_loop_that_nobody_wakes_comes_round_all_the_same() -> None:
    turns: list[None] = []
    runner = OsThreads().start("idle", lambda: bool(turns.append(None)))
    await until(lambda: len(turns) >= 3)
    assert await runner.stop(60.0)


async def test_wakes_that_come_at_once_are_one_and_none_is_lost() -> None:
    asked, seen = [0], list[int]()
    runner = OsThreads().start("busy", lambda: bool(seen.append(asked[0])))

    def wake_often() -> None:
        for _ in range(1000):
            runner.wake()

    for number in range(1, 20):
        asked[0] = number
        await asyncio.gather(*(asyncio.to_thread(wake_often) for _ in range(4)))
        await until(lambda number=number: seen[-1] == number)
    assert await runner.stop(60.0)


def test_a_turn_that_raises_ends_the_process_and_says_so() -> None:
    """Nothing else would: the thread would be gone, and what waits for it would wait for ever."""
    code = (
        "import asyncio\n"
        "from kvstore.threads import OsThreads\n"
        "async def main():\n"
        "    OsThreads().start('engine', lambda: 1 / 0)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "the loop engine broke; the process ends" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr
