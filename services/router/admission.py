"""Lets requests begin as there is room for them, fairly; refuses those that would wait too long or find the queue full.

Who waits, waits here and not at the workers: a worker is given no more prompts than keep it busy (`fleet.Headroom`), so
that priority and fairness order the queue until the last moment. A request's sequences take turns with others.

    applies ─▶ refused: 429 queue full, 503 its first token would come too late
       │
       └─▶ waits in its model's fair queue ─▶ granted, sequence by sequence ─▶ begun at a worker ─▶ ended
              │  client gone, deadline             │ gone before it began
              └─▶ leaves the queue                 └─▶ gives the place back
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from services.rates import GUESSED, Rates
from services.router.errors import ApiError, overloaded, too_late
from services.router.sharing import (
    OUTPUT_TOKEN_COST,
    DrainRate,
    Estimate,
    FairQueue,
    Seats,
    Surplus,
    expected_ttft,
    is_hopeless,
    retry_after_s,
)


@dataclass(frozen=True)
class Applicant:
    """Who asks for room, and for what."""

    model: str = ""
    client: str = ""
    """A tenant, or where no key is needed an address: what fairness is among."""
    priority: int = 0
    """Smaller is sooner."""
    num_prompt_tokens: int = 0
    """Of all its prompts."""
    ttft_s: float = math.inf
    """What is left now of the time that its first token may take; infinite: it has no such objective."""


class Fleet(Protocol):
    """The workers, as admission sees them."""

    def has_room(self, model: str, num_pending: int, num_pending_tokens: float) -> bool:
        """Whether a worker should get another sequence now. Pending: granted a moment ago, and not sent yet."""

    def num_seats(self, model: str) -> float:
        """Sequences that its workers' batches hold; infinity where that is not known."""

    def front_tokens(self, model: str) -> float:
        """Prompt tokens in front of a new one at the worker that has fewest."""

    def num_prefilling(self, model: str) -> int:
        """Workers that share the model's prompts."""

    def rates(self, model: str) -> Rates:
        """Returns how fast they are."""


class OpenFleet:
    """One that has always room: then the capacity alone decides."""

    def has_room(self, model: str, num_pending: int, num_pending_tokens: float) -> bool:
        return True

    def num_seats(self, model: str) -> float:
        return math.inf

    def front_tokens(self, model: str) -> float:
        return 0.0

    def num_prefilling(self, model: str) -> int:
        return 1

    def rates(self, model: str) -> Rates:
        return GUESSED


@dataclass(eq=False)
class _Line:
    """One model's queue, who has seats at its workers, and what was granted and is not with a worker yet."""

    queue: FairQueue[Room]
    seats: Seats
    drain: DrainRate = field(default_factory=DrainRate)
    surplus: Surplus = field(default_factory=Surplus)
    num_pending: int = 0
    num_pending_tokens: float = 0.0


class Room:
    """One request's share of the room. Made by `Admission.admit`, which takes it back."""

    def __init__(self, num_sequences: int, applicant: Applicant, line: _Line, give_back: Callable[[int], None]) -> None:
        self.on_grant: Callable[[], None] = lambda: None
        self.applicant = applicant
        self.num_waiting = num_sequences
        self.num_free = 0
        """Sequences that may begin now."""
        self.num_begun = 0
        self.was_granted = False
        """Some of it, ever."""
        self.refusal: ApiError | None = None
        """It waited too long: whoever waits for it is to raise this."""
        self.num_tokens = applicant.num_prompt_tokens / num_sequences
        """Of each sequence's prompt; choices of one prompt share it."""
        self.last_grant_s = math.inf
        """The last moment at which room for it is of use, by the admission's clock."""
        self._due_s: deque[float] = deque()  # of those granted and not begun
        self._line = line
        self._give_back = give_back

    def begin(self) -> float:
        """Note that one of the free places is taken, and its order sent; returns when its first token is due."""
        self.num_free -= 1
        self.num_begun += 1
        self._settle_pending(1)
        due_s = self._due_s.popleft()
        self._give_back(0)  # it is counted at its worker now, perhaps as less
        return due_s

    def first_token(self, due_s: float, now_s: float) -> None:
        """Note when the first token of one has come, and when it was due."""
        self._line.surplus.observe(now_s - due_s, now_s)

    def end(self) -> None:
        """Note that one that had begun has ended."""
        self.num_begun -= 1
        self._line.seats.leave(self.applicant.client, 1)
        self._give_back(1)

    def generated(self, num_tokens: int) -> None:
        """Charge its client for tokens of an answer."""
        self._line.queue.charge(self.applicant.client, OUTPUT_TOKEN_COST * num_tokens)

    def give_up(self, refusal: ApiError) -> None:
        """Refuse it if none of it has begun: whoever waits for it hears of that."""
        if not self.was_granted:
            self.refusal = refusal
            self.on_grant()

    def granted(self, due_s: float) -> None:
        """Note that one more sequence may begin, whose first token is reckoned to come then, and tell whoever waits."""
        self._due_s.append(due_s)
        self.was_granted = True
        self.num_waiting -= 1
        self.num_free += 1
        self._line.num_pending += 1
        self._line.num_pending_tokens += self.num_tokens
        self.on_grant()

    def leave(self) -> None:
        """Give back what it has, and wait no more."""
        self._settle_pending(self.num_free)
        num_held = self.num_free + self.num_begun
        self._line.seats.leave(self.applicant.client, num_held, self.num_waiting)
        self._give_back(num_held)

    def _settle_pending(self, num_sequences: int) -> None:
        self._line.num_pending -= num_sequences
        self._line.num_pending_tokens -= num_sequences * self.num_tokens


class Admission:
    """Every model's queue, under one capacity. Belongs to the event loop."""

    def __init__(
        self,
        capacity: int,
        max_queue: int,
        clock: Callable[[], float],
        on_refusal: Callable[[str], None] = lambda reason: None,
        fleet: Fleet | None = None,
        weight_of: Callable[[str], float] = lambda client: 1.0,
        client_share: float = 1.0,
    ) -> None:
        """`client_share`: how much of the queue one client may fill, by more than one request, and of the workers'
        seats in any case (`Seats`)."""
        self._capacity = capacity
        self._client_share = client_share
        self._max_queue = max_queue
        self._max_queue_of_one = math.ceil(max_queue * client_share)
        self._on_refusal = on_refusal
        self._fleet = fleet or OpenFleet()
        self._weight_of = weight_of
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._num_unbegun: Counter[str] = Counter()  # by client, sequences of requests of which nothing was granted yet
        self._is_filling = False
        self.num_running = 0
        self.num_waiting = 0

    def check(self, applicant: Applicant, left_s: float, is_clients_own: bool) -> None:
        """Raise ApiError 503 if its first token cannot be expected within `left_s`; see `delay.is_hopeless`."""
        estimate = self.estimate(applicant)
        if is_hopeless(estimate, left_s, is_clients_own):
            self._on_refusal("ttft_deadline")
            raise too_late(
                f"The first token would come after {estimate.total_s:.1f} s, and has {max(left_s, 0):.1f} s."
                " Try again later.",
                retry_after_s(estimate, left_s),
            )

    def estimate(self, applicant: Applicant) -> Estimate:
        """Return what a request would wait for its first token, were it to come now."""
        model, rates = applicant.model, self._fleet.rates(applicant.model)
        line = self._lines.get(model)
        ahead, drain_per_s = 0.0, 1.0
        if line is not None:
            ahead = line.queue.tokens_ahead(applicant.client, applicant.priority) + line.num_pending_tokens
            reckoned_per_s = self._fleet.num_prefilling(model) / rates.prompt_token_s
            drain_per_s = line.drain.per_s(reckoned_per_s, self._clock())
        front = self._fleet.front_tokens(model)
        surplus_s = line.surplus.likely_s(self._clock()) if line is not None else 0.0
        return expected_ttft(ahead, drain_per_s, front, applicant.num_prompt_tokens, rates, surplus_s)

    def num_queued_tokens(self, model: str) -> float:
        """Prompt tokens that wait here."""
        line = self._lines.get(model)
        return 0.0 if line is None else line.queue.num_tokens

    @contextmanager
    def admit(self, num_sequences: int, applicant: Applicant = Applicant()) -> Iterator[Room]:
        """The request's room, for as long as it lasts. Raises ApiError 429 when the queue is full."""
        line = self._line(applicant.model)
        if not self._has_room(applicant.model, line) or len(line.queue):
            self._check_queue(num_sequences, applicant.client)
        room = Room(num_sequences, applicant, line, self._give_back)
        if applicant.ttft_s < math.inf:
            estimate = expected_ttft(0.0, 1.0, 0.0, room.num_tokens, self._fleet.rates(applicant.model))
            room.last_grant_s = self._clock() + applicant.ttft_s - estimate.own_s
        line.seats.want(applicant.client, num_sequences)
        self._wait(room, line)
        self.num_waiting += num_sequences
        self._num_unbegun[applicant.client] += num_sequences
        self.fill()
        try:
            yield room
        finally:
            if room.num_waiting:
                line.queue.remove(room, applicant.client, applicant.priority)
                self.num_waiting -= room.num_waiting
                if not room.was_granted:
                    self._begun(applicant.client, room.num_waiting)
            room.leave()

    def fill(self) -> None:
        """Let begin whoever has room now. Called with each piece of news of the fleet."""
        if self._is_filling or not self.num_waiting:
            return
        self._is_filling = True  # a grant may end a sequence at once, and come back here
        try:
            # A turn for each model, until none has any more.
            while sum(self._grant_next(model, line) for model, line in list(self._lines.items())):
                pass
        finally:
            self._is_filling = False

    def _grant_next(self, model: str, line: _Line) -> bool:
        """Let one sequence begin, if there is one and room for it."""
        if not len(line.queue) or not self._has_room(model, line):
            return False
        num_seats = min(self._fleet.num_seats(model), self._capacity)
        # A prompt begins when those in front of it at the worker are through.
        begins_s = self._clock() + self._fleet.rates(model).prompt_s(math.ceil(self._fleet.front_tokens(model)))
        popped = line.queue.pop(lambda client: line.seats.has_enough(client, num_seats), begins_s)
        if popped is None:
            return False
        room, client = popped
        line.seats.take(client)
        if not room.was_granted:
            self._begun(client, room.num_waiting)
        line.queue.charge(client, room.num_tokens)
        self.num_waiting -= 1
        self.num_running += 1
        is_backlogged = len(line.queue) > 0 or room.num_waiting > 1
        line.drain.left(room.num_tokens, self._clock(), is_backlogged)
        if room.num_waiting > 1:
            self._wait(room, line)
        room.granted(self._clock() + self._reckoned_s(model, line, room.num_tokens))
        return True

    def _line(self, model: str) -> _Line:
        if model not in self._lines:
            self._lines[model] = _Line(FairQueue(self._weight_of), Seats(self._client_share, self._clock))
        return self._lines[model]

    def _has_room(self, model: str, line: _Line) -> bool:
        return self.num_running < self._capacity and self._fleet.has_room(
            model, line.num_pending, line.num_pending_tokens
        )

    def _check_queue(self, num_sequences: int, client: str) -> None:
        own, others = self._num_unbegun[client], self._num_unbegun.total() - self._num_unbegun[client]
        if own + others + num_sequences > self._max_queue or (own and own + num_sequences > self._max_queue_of_one):
            self._on_refusal("queue_full")
            raise overloaded(
                f"The server is full: {self.num_running} sequences run and {self.num_waiting} wait, of which {own} are"
                " yours. Try again later."
            )

    def _begun(self, client: str, num_sequences: int) -> None:
        """Some of a request may run, or it has gone: it stands in the queue no more."""
        self._num_unbegun[client] -= num_sequences
        if not self._num_unbegun[client]:
            del self._num_unbegun[client]

    def _reckoned_s(self, model: str, line: _Line, num_tokens: float) -> float:
        """From its grant to its first token, by the worker's rates alone."""
        front = self._fleet.front_tokens(model) + line.num_pending_tokens / self._fleet.num_prefilling(model)
        estimate = expected_ttft(0.0, 1.0, front, num_tokens, self._fleet.rates(model))
        return estimate.worker_s + estimate.own_s

    def _wait(self, room: Room, line: _Line) -> None:
        applicant = room.applicant
        line.queue.push(room, applicant.client, room.num_tokens, applicant.priority, room.last_grant_s)

    def _give_back(self, num_sequences: int) -> None:
        self.num_running -= num_sequences
        self.fill()
