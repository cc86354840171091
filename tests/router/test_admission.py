"""The bounded entrance: room, queue, refusal, and turns among those who wait."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.router.admission import Admission, Applicant, OpenFleet, Room
from services.router.errors import ApiError


class Visitor:
    """A request that begins whatever it may."""

    def __init__(self, admission: Admission, num_sequences: int = 1, client: str = "") -> None:
        self._stack = ExitStack()
        self.room: Room = self._stack.enter_context(admission.admit(num_sequences, Applicant(client=client)))
        self.room.on_grant = self.begin
        self.begin()

    def begin(self) -> None:
        while self.room.num_free:
            self.room.begin()

    @property
    def num_inside(self) -> int:
        return self.room.num_begun

    def leave(self) -> None:
        self._stack.close()


def test_a_request_whose_first_token_would_be_late_lets_the_next_one_pass() -> None:
    now_s = 0.0
    admission = Admission(1, 9, lambda: now_s)
    with ExitStack() as visits:
        running = visits.enter_context(admission.admit(1))
        running.begin()
        late, timely, without = (
            visits.enter_context(admission.admit(1, Applicant(num_prompt_tokens=100, ttft_s=ttft_s)))
            for ttft_s in (1.0, 10.0, math.inf)
        )
        now_s = 1.0  # nothing is left for its prompt
        running.end()
        assert (late.num_free, timely.num_free, without.num_free) == (0, 1, 0)
        timely.begin()
        timely.end()
        assert (late.num_free, without.num_free) == (0, 1)
        without.begin()
        without.end()
        assert late.num_free == 1, "it is served all the same"


def test_lets_in_in_order_as_room_comes():
    admission = Admission(2, 5, time.monotonic)
    visitors = [Visitor(admission) for _ in range(4)]
    assert [visitor.num_inside for visitor in visitors] == [1, 1, 0, 0]
    assert (admission.num_running, admission.num_waiting) == (2, 2)
    visitors[1].leave()
    assert [visitor.num_inside for visitor in visitors[2:]] == [1, 0]
    for visitor in (visitors[0], *visitors[2:]):
        visitor.leave()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


def test_refuses_when_the_queue_is_full():
    admission = Admission(1, 2, time.monotonic)
    Visitor(admission)
    Visitor(admission, 2)
    with pytest.raises(ApiError) as caught:
        Visitor(admission)
    assert caught.value.status == 429
    assert caught.value.retry_after_s is not None
    assert admission.num_waiting == 2


def test_a_request_of_the_largest_weight_holds_nobody_up():
    admission = Admission(4, 100, time.monotonic)
    small = [Visitor(admission) for _ in range(4)]
    big, *later = Visitor(admission, 50), *(Visitor(admission) for _ in range(3))
    small[0].leave()
    assert big.num_inside == 1
    for visitor in small[1:]:
        visitor.leave()
    assert [visitor.num_inside for visitor in (big, *later)] == [1, 1, 1, 1]
    big.room.end()
    assert big.num_inside == 1
    assert big.room.num_waiting == 48
    big.leave()
    assert (admission.num_running, admission.num_waiting) == (3, 0)


def test_one_bigger_than_all_room_and_queue_begins_with_what_there_is_and_leaves_the_queue_to_others():
    admission = Admission(2, 1, time.monotonic)
    big, other = Visitor(admission, 7), Visitor(admission)
    assert (big.num_inside, other.num_inside) == (2, 0)
    with pytest.raises(ApiError):
        Visitor(admission)
    for expected in (2, 1, 1, 1, 1, 1, 0):
        big.room.end()
        assert big.num_inside == expected
    assert other.num_inside == 1


def test_one_who_gives_up_waiting_leaves_no_trace():
    admission = Admission(1, 5, time.monotonic)
    first, waiting, last = Visitor(admission), Visitor(admission, 3), Visitor(admission)
    waiting.leave()
    assert admission.num_waiting == 1
    first.leave()
    assert last.num_inside == 1
    last.leave()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


def test_one_client_leaves_some_of_the_queue_to_others():
    admission = Admission(1, 8, time.monotonic, client_share=0.5)
    busy = [Visitor(admission, client="busy") for _ in range(5)]
    with pytest.raises(ApiError, match="4 are yours"):
        Visitor(admission, client="busy")
    others = [Visitor(admission, client=f"other-{number}") for number in range(4)]
    with pytest.raises(ApiError, match="0 are yours"):
        Visitor(admission, client="late")
    for visitor in (*busy, *others):
        visitor.leave()
    big = [Visitor(admission, client="big"), Visitor(admission, 7, client="big")]
    assert admission.num_waiting == 7, "a lone request may be as large as the queue"
    for visitor in big:
        visitor.leave()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


def test_a_client_that_fills_the_batch_leaves_seats_to_those_that_have_asked_lately():
    class Batch(OpenFleet):
        def num_seats(self, model: str) -> float:
            return 8

    admission = Admission(1000, 1000, time.monotonic, client_share=0.75, fleet=Batch())
    Visitor(admission, client="small").leave()
    flood = Visitor(admission, 100, client="flood")
    assert flood.num_inside == 7
    small = Visitor(admission, client="small")
    assert small.num_inside == 1, "it waits for nobody"
    flood.room.end()
    assert flood.num_inside == 7, "and it goes on beside that"
    small.leave()
    flood.leave()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


def test_the_queue_before_workers_that_have_no_room_is_bounded():
    class Full(OpenFleet):
        def has_room(self, model: str, num_pending: int, num_pending_tokens: float) -> bool:
            return False

    admission = Admission(1000, 2, time.monotonic, fleet=Full())
    waiting = [Visitor(admission) for _ in range(2)]
    with pytest.raises(ApiError):
        Visitor(admission)
    waiting[0].leave()
    assert Visitor(admission).num_inside == 0


class NarrowFleet(OpenFleet):
    """Takes one sequence at a time: who was granted and is not with its worker yet stands in the way of the next."""

    def has_room(self, model: str, num_pending: int, num_pending_tokens: float) -> bool:
        return not num_pending


def test_whoever_is_with_its_worker_makes_room_for_the_next() -> None:
    admission = Admission(10, 10, time.monotonic, fleet=NarrowFleet())
    with ExitStack() as stack:
        rooms = [stack.enter_context(admission.admit(1)) for _ in range(3)]
        for number, room in enumerate(rooms):
            assert [each.num_free + each.num_begun for each in rooms] == [1] * (number + 1) + [0] * (2 - number)
            room.begin()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


class AdmissionMachine(RuleBasedStateMachine):
    """Whatever comes and goes: the room is never exceeded, never idle while somebody waits, and nothing leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(3, 6, time.monotonic)
        self.visitors: list[Visitor] = []

    @rule(num_sequences=st.integers(1, 9))
    def come(self, num_sequences):
        try:
            self.visitors.append(Visitor(self.admission, num_sequences))
        except ApiError:
            assert self.admission.num_running == 3

    @precondition(lambda self: self.visitors)
    @rule(data=st.data())
    def go(self, data):
        self.visitors.pop(data.draw(st.integers(0, len(self.visitors) - 1))).leave()

    @precondition(lambda self: any(visitor.num_inside for visitor in self.visitors))
    @rule(data=st.data())
    def end_one(self, data):
        data.draw(st.sampled_from([visitor for visitor in self.visitors if visitor.num_inside])).room.end()

    @invariant()
    def counts_add_up(self):
        running = sum(visitor.num_inside for visitor in self.visitors)
        waiting = sum(visitor.room.num_waiting for visitor in self.visitors)
        assert (self.admission.num_running, self.admission.num_waiting) == (running, waiting)
        assert running <= 3
        assert running == 3 or not waiting

    def teardown(self):
        for visitor in self.visitors:
            visitor.leave()
        assert (self.admission.num_running, self.admission.num_waiting) == (0, 0)


TestAdmissionMachine = AdmissionMachine.TestCase
