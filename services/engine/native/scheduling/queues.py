"""Keeps each live request's place: one per status, in the one order of all.

That order is (priority, arrival, order of coming); smaller is sooner. A request's status and its place change together,
in `enter` and `move` alone. Blocks are not its affair.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from services.engine.native.scheduling.request import Request, RequestStatus
from services.engine.request import EngineError, InvalidRequest


@dataclass(order=True)
class QueueEntry:
    """A request's place in the one order."""

    priority: int
    arrival_s: float
    number: int  # order of coming; kept over preemptions
    request: Request = field(compare=False)


def _num_uncomputed(entry: QueueEntry) -> int:
    return entry.request.num_tokens - entry.request.num_computed_tokens


class RequestQueues:
    """All live requests of an engine. The lists are sorted; others read them, and change them by `enter` and `move`."""

    def __init__(self) -> None:
        self.waiting: list[QueueEntry] = []  # WAITING and PREEMPTED
        self.reserving: list[QueueEntry] = []
        self.reserved: list[QueueEntry] = []
        self.running: list[QueueEntry] = []
        self._entries: dict[str, QueueEntry] = {}  # every live request, by id
        self._num_arrivals = 0
        self._places = {
            RequestStatus.WAITING: self.waiting,
            RequestStatus.PREEMPTED: self.waiting,
            RequestStatus.RESERVING: self.reserving,
            RequestStatus.RESERVED: self.reserved,
            RequestStatus.RUNNING: self.running,
        }

    @property
    def num_queued(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self.waiting) + len(self.reserving)

    @property
    def num_in_batch(self) -> int:
        """Requests that have a place in the batch: they run, or will as soon as their prompt's blocks are read."""
        return len(self.running) + len(self.reserved)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens (and tokens to compute again) that are not computed yet, here. Any thread."""
        remaining = [_num_uncomputed(entry) for entry in (*self.waiting, *self.running)]
        return sum(num_tokens for num_tokens in remaining if num_tokens > 1)  # 1: a decode row

    @property
    def num_stream_tokens(self) -> int:
        """Tokens of prompt and output over the streams, those that run and have their prompt computed. Any thread."""
        return sum(entry.request.num_tokens for entry in tuple(self.running) if _num_uncomputed(entry) == 1)

    def live(self, request_id: str) -> Request | None:
        """The live request of that id."""
        entry = self._entries.get(request_id)
        return None if entry is None else entry.request

    def enter(self, request: Request, status: RequestStatus) -> None:
        """Make a new request live. Raises `InvalidRequest`, changing nothing, where its id is another one's."""
        if request.request_id in self._entries:
            raise InvalidRequest("request_id", f"{request.request_id} is in use")
        request.move_to(status)
        self._num_arrivals += 1
        entry = QueueEntry(request.priority, request.arrival_s, self._num_arrivals, request)
        self._entries[request.request_id] = entry
        insort(self._places[status], entry)

    def move(self, request: Request, status: RequestStatus) -> None:
        """Change a live request's status and with it its place; NEW and FINISHED have none, so it is live no more."""
        entry = self._entries[request.request_id]
        left = self._places[request.status]
        request.move_to(status)
        left.remove(entry)
        if status in self._places:
            insort(self._places[status], entry)
        else:
            del self._entries[request.request_id]

    def check_integrity(self) -> None:
        """Raise unless every live request is in one place, which fits its status."""
        kept = {id(place): place for place in self._places.values()}.values()
        problems = [
            f"{entry.request.request_id} is {entry.request.status.name}, kept elsewhere"
            for place in kept
            for entry in place
            if self._places.get(entry.request.status) is not place
        ]
        if sum(map(len, kept)) != len(self._entries):
            problems.append(f"{len(self._entries)} live requests, {[len(place) for place in kept]} in places")
        if problems:
            raise EngineError(f"scheduler: {'; '.join(problems[:8])}")
