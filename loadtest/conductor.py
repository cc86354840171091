"""The master's side of a run: inspects the target, splits the plan among processes, merges their records.

Without workers the one process is both sides. One conductor serves one locust environment, run after run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from locust.env import Environment
from locust.rpc.protocol import Message
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

from loadtest.figures import RunResult, Scraper, server_facts
from loadtest.performer import Assignment, Performer
from loadtest.plan import Job, Plan, RequestRecord, make_plan
from loadtest.send import API_KEY_VARIABLE, ServedModel, TargetError, look_up_model

log = logging.getLogger(__name__)

_PART, _RECORDS = "loadtest_part", "loadtest_records"
# How long after the order a run starts: the parts must have arrived and been planned by then.
_LEAD_LOCAL_S, _LEAD_DISTRIBUTED_S = 0.2, 2.0


@dataclass
class _Run:
    number: int
    job: Job
    served: ServedModel
    plan: Plan
    started_unix_s: float
    scraper: Scraper
    open_parts: dict[int, str]  # index of each part that has not ended: its worker's client id
    records: list[RequestRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Conductor:
    """Listens to locust's events. `job_of` says what to run, when a test starts (ValueError: nothing that can be run);
    `finished` gets the result when it stops, also of a run that was cut short; `failed` is told why a run cannot start.
    """

    def __init__(
        self,
        environment: Environment,
        job_of: Callable[[], Job],
        finished: Callable[[RunResult], None],
        failed: Callable[[str], None],
    ) -> None:
        self._job_of = job_of
        self._finished = finished
        self._failed = failed
        self._run: _Run | None = None
        self._num_runs = 0
        self._api_key = os.environ.get(API_KEY_VARIABLE, "")
        self._cannot_start = False
        runner = environment.runner
        assert runner is not None
        self._runner = runner
        is_worker = isinstance(runner, WorkerRunner)
        self.performer = Performer(environment, self._send_records if is_worker else self._take_records, self._api_key)
        if is_worker:
            runner.register_message(_PART, self._take_part)
            return
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stop.add_listener(self._stop)
        if isinstance(runner, MasterRunner):
            runner.register_message(_RECORDS, self._take_message)

    @property
    def is_over(self) -> bool:
        """Whether the run has nothing left to do, or could not be started."""
        if self._cannot_start:
            return True
        if self._run is not None and isinstance(self._runner, MasterRunner):
            self._drop_lost_workers(self._run, self._runner)
        return self._run is not None and not self._run.open_parts

    @property
    def num_processes(self) -> int:
        return max(1, len(_workers(self._runner))) if isinstance(self._runner, MasterRunner) else 1

    def _start(self, **_: object) -> None:
        self._cannot_start = False
        try:
            self._run = self._begin(self._job_of())
        except (TargetError, ValueError) as error:
            self._cannot_start = True
            self._failed(str(error))

    def _begin(self, job: Job) -> _Run:
        served = look_up_model(job.url, job.options.model, self._api_key)
        plan = make_plan(job.options, served.max_model_len)
        self._num_runs += 1
        workers = _workers(self._runner) if isinstance(self._runner, MasterRunner) else [""]
        lead_s = _LEAD_DISTRIBUTED_S if isinstance(self._runner, MasterRunner) else _LEAD_LOCAL_S
        scraper = Scraper(job.metrics_urls, self._api_key)
        run = _Run(
            self._num_runs, job, served, plan, time.time() + lead_s, scraper, open_parts=dict(enumerate(workers))
        )
        scraper.start(time.perf_counter() + lead_s)
        for index, worker in run.open_parts.items():
            context = served.max_model_len
            part = Assignment(run.number, index, len(workers), lead_s, job.url, served.name, context, job.options)
            if isinstance(self._runner, MasterRunner):
                self._runner.send_message(_PART, msgspec.to_builtins(part), client_id=worker)
            else:
                self.performer.assign(part)
        return run

    def _stop(self, **_: object) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        run.scraper.stop()
        if run.scraper.num_missed:
            run.notes.append(f"{run.scraper.num_missed} pages of metrics did not come")
        job, plan = run.job, run.plan
        self._finished(
            RunResult(
                target=job.target,
                url=job.url,
                model=run.served.name,
                workload=plan.description,
                started_unix_s=run.started_unix_s,
                options=job.options,
                num_planned=len(plan.requests),
                num_cut=plan.num_cut,
                measured_from_s=plan.measured_from_s,
                measured_s=plan.measured_s,
                records=tuple(run.records),
                samples=tuple(run.scraper.samples),
                notes=tuple(run.notes),
                turn=job.turn,
                server_command=job.server_command,
                server_facts=server_facts(job.metrics_urls, self._api_key),
                origin=job.origin,
            )
        )

    def _take_records(self, part: Assignment, records: list[RequestRecord], is_last: bool) -> None:
        self._merge(part.run, part.index, records, is_last)

    def _merge(self, run_number: int, index: int, records: list[RequestRecord], is_last: bool) -> None:
        if self._run is None or self._run.number != run_number:
            return  # a run that was stopped, and has its result
        self._run.records += records
        if is_last:
            self._run.open_parts.pop(index, None)

    def _drop_lost_workers(self, run: _Run, runner: MasterRunner) -> None:
        known = {each.id for each in runner.clients.values() if each.state != STATE_MISSING}
        for index, worker in list(run.open_parts.items()):
            if worker not in known:
                del run.open_parts[index]
                run.notes.append(f"worker {worker} went away; its part of the records is not complete")
                log.error("worker %s went away during the run", worker)

    # Messages between processes.

    def _take_part(self, environment: Environment, msg: Message, **_: object) -> None:
        self.performer.assign(msgspec.convert(msg.data, Assignment))

    def _send_records(self, part: Assignment, records: list[RequestRecord], is_last: bool) -> None:
        if records or is_last:
            data = {"run": part.run, "index": part.index, "is_last": is_last}
            self._runner.send_message(_RECORDS, data | {"records": [each.to_dict() for each in records]})

    def _take_message(self, environment: Environment, msg: Message, **_: object) -> None:
        data = msg.data
        records = [RequestRecord.from_dict(each) for each in data["records"]]
        self._merge(int(data["run"]), int(data["index"]), records, bool(data["is_last"]))


def _workers(runner: MasterRunner) -> list[str]:
    """Client ids of the workers that a start would use."""
    clients = runner.clients
    return sorted(each.id for each in (*clients.ready, *clients.running, *clients.spawning))
