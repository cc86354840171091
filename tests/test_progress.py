"""Who stands still: parts that have work and do not advance, and nobody else."""

from __future__ import annotations

import pytest

from services.progress import Progress, Watch

INTERVAL_S = 0.25


class Part:
    """A part of the test's: it has work or not, and advances when the test says so."""

    def __init__(self, name: str = "part", allowed_s: float = 2.0) -> None:
        self.has_work = True
        self.allowed_s = allowed_s
        self.watch = Watch(name, lambda: self.has_work, lambda: self.allowed_s)


class Clock:
    """Looks in time, or not."""

    def __init__(self, *parts: Part) -> None:
        self.progress = Progress([part.watch for part in parts], INTERVAL_S)
        self.now_s = 100.0
        self.progress.look(self.now_s)

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / INTERVAL_S)):
            self.jump(INTERVAL_S)

    def jump(self, seconds: float) -> None:
        self.now_s += seconds
        self.progress.look(self.now_s)


def test_a_part_that_has_work_and_stands_still_is_stuck_once_that_is_longer_than_allowed() -> None:
    still, busy = Part("still"), Part("busy")
    clock = Clock(still, busy)
    for _ in range(8):
        busy.watch.advanced()
        clock.wait(INTERVAL_S)
    assert clock.progress.stuck() == ()
    assert clock.progress.still_s() == {"still": 2.0, "busy": 0.0}
    busy.watch.advanced()
    clock.wait(INTERVAL_S)
    assert clock.progress.stuck() == ("still",)


def test_a_part_without_work_is_never_stuck() -> None:
    part = Part()
    part.has_work = False
    clock = Clock(part)
    clock.wait(1000)
    assert clock.progress.stuck() == ()


def test_a_part_that_advances_again_is_not_stuck_any_more() -> None:
    part = Part()
    clock = Clock(part)
    clock.wait(10)
    assert clock.progress.stuck() == ("part",)
    part.watch.advanced()
    clock.wait(INTERVAL_S)
    assert clock.progress.stuck() == ()
    assert clock.progress.still_s() == {"part": 0.0}


def test_long_work_is_allowed_its_time() -> None:
    part = Part()
    clock = Clock(part)
    part.allowed_s = 60.0
    clock.wait(59)
    assert clock.progress.stuck() == ()
    clock.wait(2)
    assert clock.progress.stuck() == ("part",)


@pytest.mark.parametrize("seconds", [10.0, 3600.0, 1e6])
def test_nobody_is_blamed_for_the_time_in_which_the_watcher_itself_stood_still(seconds: float) -> None:
    part = Part()
    clock = Clock(part)
    clock.wait(1)
    clock.jump(seconds)
    assert clock.progress.stuck() == ()
    assert clock.progress.still_s() == {"part": 1.0 + 2 * INTERVAL_S}


def test_nobody_is_blamed_for_the_time_in_which_the_process_waited_for_a_processor() -> None:
    part = Part(allowed_s=2.0)
    clock = Clock(part)
    for _ in range(100):
        clock.now_s += INTERVAL_S
        clock.progress.look(clock.now_s, starved_s=0.24)
    assert clock.progress.still_s()["part"] == pytest.approx(1.0)
    assert clock.progress.stuck() == ()


def test_a_process_that_should_end_has_stood_still_beyond_what_is_allowed_by_the_limit() -> None:
    part = Part(allowed_s=2.0)
    clock = Clock(part)
    clock.wait(62)
    assert clock.progress.overdue(60.0) == ()
    clock.wait(INTERVAL_S)
    assert clock.progress.overdue(60.0) == ("part",)


def test_what_a_new_start_does_not_cure_is_no_reason_for_one() -> None:
    part = Part()
    part.watch.is_curable = lambda: False
    clock = Clock(part)
    clock.wait(1000)
    assert (clock.progress.stuck(), clock.progress.overdue(60.0)) == (("part",), ())
