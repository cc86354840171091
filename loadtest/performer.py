"""A worker's side of a run: takes its part of the plan from the conductor, sends it, reports every record.

In a process of its own it talks to the conductor through locust's messages, else by calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import gevent
from locust.env import Environment

from loadtest.plan import LoadOptions, RequestRecord, make_plan
from loadtest.send import Client, Dispatcher, Progress

_REPORT_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Assignment:
    """A process's part of a run: part `index` of `num_parts` of the plan that these settings make.

    The run starts `lead_s` after this arrives. So no clocks are compared; parts start within the network's delay of
    each other.
    """

    run: int
    index: int
    num_parts: int
    lead_s: float
    url: str
    model: str
    max_model_len: int | None
    options: LoadOptions


class Performer:
    """Runs one assignment at a time. `report` takes (assignment, records, whether these are the last ones)."""

    def __init__(
        self, environment: Environment, report: Callable[[Assignment, list[RequestRecord], bool], None], api_key: str
    ) -> None:
        self._environment = environment
        self._report = report
        self._api_key = api_key
        self._assignment: Assignment | None = None
        self._dispatcher: Dispatcher | None = None
        self._unreported: list[RequestRecord] = []

    def assign(self, assignment: Assignment) -> None:
        """Takes the assignment; `perform` will carry it out."""
        start = time.perf_counter() + assignment.lead_s
        options = assignment.options
        plan = make_plan(options, assignment.max_model_len)
        client = Client(assignment.url, assignment.model, options, plan.scale, self._api_key)
        part = plan.part(assignment.index, assignment.num_parts)
        self._unreported = []
        self._dispatcher = Dispatcher(client, part, start, options.late_ms / 1000, self._took_place)
        self._assignment = assignment

    @property
    def progress(self) -> Progress:
        return self._dispatcher.progress if self._dispatcher else Progress()

    def perform(self) -> None:
        """Carry out the assignment for the first user that locust spawns here; return after the last answer."""
        assignment, self._assignment = self._assignment, None
        if assignment is None or self._dispatcher is None:
            return
        dispatcher = self._dispatcher
        reporter = gevent.spawn(self._keep_reporting, assignment)
        try:
            dispatcher.run()
        finally:
            dispatcher.kill()
            reporter.kill()
            self._flush(assignment, is_last=True)

    def _keep_reporting(self, assignment: Assignment) -> None:
        while True:
            gevent.sleep(_REPORT_INTERVAL_S)
            self._flush(assignment, is_last=False)

    def _flush(self, assignment: Assignment, is_last: bool) -> None:
        records, self._unreported = self._unreported, []
        self._report(assignment, records, is_last)

    def _took_place(self, record: RequestRecord) -> None:
        self._unreported.append(record)
        self._show_in_locust(record)

    def _show_in_locust(self, record: RequestRecord) -> None:
        """Locust's statistics: end-to-end times as its requests, first tokens beside them, out of its totals."""
        failure = None if record.ok else RuntimeError(f"{record.outcome}: {record.error}")
        self._environment.events.request.fire(
            request_type="e2e",
            name=record.kind,
            response_time=record.e2e_s * 1000,
            response_length=record.num_output_tokens,
            exception=failure,
            context={},
        )
        if record.ttft_s is not None and record.ok:
            self._environment.stats.get(record.kind, "ttft").log(round(record.ttft_s * 1000), 0)
