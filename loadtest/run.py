"""Runs once in this process, through locust's local runner."""

from __future__ import annotations

from collections.abc import Callable

import gevent
from locust.env import Environment

from loadtest.conductor import Conductor
from loadtest.figures import RunResult
from loadtest.plan import Job, RunFailed
from loadtest.send import Progress
from loadtest.users import OpenLoopUser, attach

_POLL_S = 0.1


def run(job: Job, watch: Callable[[Progress], None]) -> RunResult:
    """Carries the job out; `watch` sees the counts several times a second. Raises RunFailed."""
    results: list[RunResult] = []
    environment = Environment(user_classes=[OpenLoopUser])
    runner = environment.create_local_runner()
    failures: list[str] = []
    conductor = Conductor(environment, lambda: job, results.append, failures.append)
    attach(environment, conductor)
    try:
        runner.start(1, spawn_rate=1)
        while not conductor.is_over:
            watch(conductor.performer.progress)
            gevent.sleep(_POLL_S)
        watch(conductor.performer.progress)
    finally:
        runner.quit()
    if failures:
        raise RunFailed(failures[0])
    return results[0]
