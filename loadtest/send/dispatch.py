"""The open loop: sends each request at its time, in its own greenlet, whatever became of those before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gevent
from gevent.pool import Group

from loadtest.plan import PlannedRequest, RequestRecord
from loadtest.send.client import Client


@dataclass
class Progress:
    """Counts of a run that is under way; read by whoever shows them."""

    num_planned: int = 0
    num_sent: int = 0
    num_done: int = 0
    num_late: int = 0

    @property
    def num_in_flight(self) -> int:
        return self.num_sent - self.num_done


class Dispatcher:
    """One process's part of a plan. Owns the greenlets of its requests; `done` gets each record once.

    `start` is the run's start on the clock of time.perf_counter.
    """

    def __init__(
        self,
        client: Client,
        part: Sequence[PlannedRequest],
        start: float,
        late_s: float,
        done: Callable[[RequestRecord], None],
    ) -> None:
        self._client = client
        self._part = part
        self._start = start
        self._late_s = late_s
        self._done = done
        self._in_flight = Group()
        self._failures: list[BaseException] = []
        self.progress = Progress(len(part))

    def run(self) -> None:
        """Sends everything; returns when the last answer has ended. Raises RuntimeError for our own bugs."""
        for planned in self._part:
            body = self._client.body(planned)
            gevent.sleep(max(0.0, self._start + planned.at_s - time.perf_counter()))
            self._in_flight.spawn(self._send, planned, body).link_exception(self._failed)
        self._in_flight.join()
        if self._failures:
            raise RuntimeError(f"{len(self._failures)} requests broke the client") from self._failures[0]

    def kill(self) -> None:
        """Cuts what is in flight: the run was stopped. Those requests leave no record."""
        self._in_flight.kill()

    def _failed(self, greenlet: gevent.Greenlet) -> None:
        self._failures.append(greenlet.exception)

    def _send(self, planned: PlannedRequest, body: bytes) -> None:
        self.progress.num_sent += 1
        record = self._client.send(planned, body, self._start)
        self.progress.num_done += 1
        self.progress.num_late += record.late_s > self._late_s
        self._done(record)
