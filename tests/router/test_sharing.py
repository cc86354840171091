"""Fairness among tenants, the rate at which a queue drains, who is refused for delay, and the tenants' file."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.rates import Rates
from services.router.sharing import (
    DrainRate,
    Estimate,
    FairQueue,
    Seats,
    Share,
    Surplus,
    expected_ttft,
    is_hopeless,
    read_shares,
    retry_after_s,
)
from services.settings import SettingsError

T = TypeVar("T")

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 4.0, "somebody urgent": 1.0}
TENANTS = ["a", "b", "c"]


def popped(queue: FairQueue[T]) -> tuple[T, str]:
    found = queue.pop()
    assert found is not None
    return found


def served(queue: FairQueue[int], num_items: int, tokens: float) -> list[str]:
    """Whose items come, each charged as it comes."""
    order = []
    for _ in range(num_items):
        _, tenant = popped(queue)
        queue.charge(tenant, tokens)
        order.append(tenant)
    return order


def test_one_tenant_is_first_come_first_served() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(5):
        queue.push(number, "a", 10)
    assert [popped(queue)[0] for _ in range(5)] == list(range(5))
    assert queue.pop() is None


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(100):
        queue.push(number, "flood", 10)
    assert served(queue, 10, 10) == ["flood"] * 10
    queue.push(0, "small", 10)
    assert "small" in served(queue, 2, 10)


def test_tenants_that_all_wait_are_served_by_their_weights() -> None:
    queue: FairQueue[int] = FairQueue(WEIGHTS.__getitem__)
    for tenant in TENANTS:
        for number in range(80):
            queue.push(number, tenant, 10)
    order = served(queue, 70, 10)
    assert {tenant: order.count(tenant) for tenant in TENANTS} == {"a": 10, "b": 20, "c": 40}


def test_neither_idleness_is_credit_nor_work_without_rivals_debt() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(50):
        queue.push(number, "busy", 1000)
    served(queue, 49, 1000)
    queue.push(0, "new", 1000)
    for number in range(9):
        queue.push(number, "busy", 1000)
        queue.push(number, "new", 1000)
    order = served(queue, 10, 1000)
    assert order.count("busy") == order.count("new") == 5


def test_a_smaller_priority_goes_first_whatever_its_tenant_has_had() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.charge("a", 1e6)
    queue.push("late", "b", 10, priority=1)
    queue.push("urgent", "a", 10, priority=0)
    assert [popped(queue)[0] for _ in range(2)] == ["urgent", "late"]


def test_a_tenant_that_has_enough_waits_and_keeps_its_place() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("urgent", "full", 10, priority=0)
    queue.push("first", "full", 10, priority=1)
    queue.push("other", "small", 10, priority=1)
    assert queue.pop({"full"}.__contains__) == ("other", "small")
    assert queue.pop({"full"}.__contains__) is None
    assert [popped(queue)[0] for _ in range(2)] == ["urgent", "first"]


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def seats_taken(seats: Seats, client: str, num_seats: int, num_wanted: int) -> int:
    """How many of those that it wants the client gets."""
    seats.want(client, num_wanted)
    num_taken = 0
    while num_taken < num_wanted and not seats.has_enough(client, num_seats) and num_taken < num_seats:
        seats.take(client)
        num_taken += 1
    return num_taken


def test_who_would_be_late_yields_to_who_can_be_in_time_but_for_each_eighth_turn() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(3):
        queue.push(number, "a", 10, due_s=1.0)
    for number in range(3, 20):
        queue.push(number, "a", 10, due_s=100.0)
    order = [(queue.pop(now_s=2.0) or (None,))[0] for _ in range(20)]
    assert order[:17] == [3, 4, 5, 6, 7, 8, 9, 0, *range(10, 17), 1, 17]
    assert order[17:] == [18, 19, 2]
    assert queue.pop(now_s=2.0) is None
    assert queue.num_tokens == 0


def test_a_late_one_leaves_when_its_client_does_and_is_nobody_s_wait() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("late", "a", 500, due_s=1.0)
    queue.push("later", "a", 30, due_s=1.0)
    queue.push("timely", "a", 20)
    assert queue.tokens_ahead("a") == 550
    assert queue.pop(now_s=2.0) == ("timely", "a")
    assert queue.tokens_ahead("a") == 0, "a new one passes them"
    queue.remove("late", "a")
    assert (queue.num_tokens, len(queue)) == (30, 1)
    assert queue.pop(now_s=2.0) == ("later", "a")


def test_lateness_takes_nobody_s_share() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        queue.push(f"late {number}", "a", 10, due_s=1.0)
        queue.push(f"timely {number}", "b", 10)
    tenants = []
    while (found := queue.pop(now_s=2.0)) is not None:
        tenants.append(found[1])
        queue.charge(found[1], 10)
    assert sorted(tenants[:4]) == ["a", "a", "b", "b"]


def test_one_client_alone_has_all_seats_and_leaves_those_to_others_that_they_have_wanted() -> None:
    clock = Hand()
    alone, beside_one, beside_many, shared = (Seats(share, clock) for share in (0.75, 0.75, 0.75, 1.0))
    beside_one.want("small", 2)
    for number in range(50):
        beside_many.want(f"peer-{number}", 1)
        shared.want(f"peer-{number}", 1)
    taken = [seats_taken(seats, "big", 64, 1000) for seats in (alone, beside_one, beside_many, shared)]
    assert taken == [64, 62, 48, 64]


def test_what_others_have_wanted_is_forgotten_after_a_while_and_not_while_they_want_it() -> None:
    clock = Hand()
    seats = Seats(0.75, clock)
    seats.want("small", 1)
    assert seats_taken(seats, "big", 8, 100) == 7
    clock.now_s += 1000
    assert seats.has_enough("big", 8), "it waits still"
    seats.leave("small", 0, 1)
    for later_s, has_enough in ((4, True), (2, True), (5, False)):
        clock.now_s += later_s
        assert seats.has_enough("big", 8) is has_enough
    seats.want("small", 1)
    seats.take("small")
    seats.leave("small", 1)
    assert seats.has_enough("big", 8), "it was there a moment ago"


def test_a_worker_with_few_seats_keeps_none_of_them_empty() -> None:
    seats = Seats(0.75, Hand())
    seats.want("small", 5)
    assert seats_taken(seats, "big", 3, 10) == 3


def test_who_gives_up_leaves_no_trace() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("first", "second", "third"):
        queue.push(item, "a", 10)
    queue.remove("second", "a")
    assert (len(queue), queue.tokens_ahead("a")) == (2, 20)
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove("second", "a")
    assert [popped(queue)[0], popped(queue)[0]] == ["first", "third"]
    assert queue.tokens_ahead("a") == 0


ITEMS = st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 100)), max_size=30)


@settings(max_examples=40, deadline=None)
@given(items=ITEMS, tenant=st.sampled_from(TENANTS), num_urgent=st.integers(0, 3))
def test_the_tokens_ahead_of_a_new_one_are_those_that_are_served_before_it(items, tenant, num_urgent) -> None:
    queue: FairQueue[object] = FairQueue(WEIGHTS.__getitem__)
    tokens: dict[object, int] = {}
    urgent = [("somebody urgent", 50)] * num_urgent
    for level, (owner, num_tokens) in [*((0, each) for each in urgent), *((1, each) for each in items)]:
        item = object()
        tokens[item] = num_tokens
        queue.push(item, owner, num_tokens, level)
    expected, mine = queue.tokens_ahead(tenant, 1), object()
    queue.push(mine, tenant, 1, 1)
    before = 0
    while (found := popped(queue))[0] is not mine:
        queue.charge(found[1], tokens[found[0]])
        before += tokens[found[0]]
    # Items are whole: each other tenant may be one of them off.
    assert abs(before - expected) <= 100 * len(TENANTS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 100)), min_size=1, max_size=60))
def test_what_tenants_that_wait_have_had_differs_by_an_items_worth_at_most(items) -> None:
    queue: FairQueue[int] = FairQueue(WEIGHTS.__getitem__)
    for tenant, num_tokens in items:
        queue.push(num_tokens, tenant, num_tokens)
    waiting = {tenant: [n for owner, n in items if owner == tenant] for tenant in TENANTS}
    while len(queue):
        num_tokens, tenant = popped(queue)
        queue.charge(tenant, num_tokens)
        waiting[tenant].remove(num_tokens)
        counters = [queue.counter(each) for each, left in waiting.items() if left]
        assert not counters or max(counters) - min(counters) <= 100


def test_a_queue_is_as_fast_as_it_was_measured_and_before_that_as_it_is_reckoned() -> None:
    drain = DrainRate()
    assert drain.per_s(1000, now_s=0) == pytest.approx(1000)
    for step in range(200):
        drain.left(50, now_s=step / 10, is_backlogged=True)  # 500 tokens a second
    assert drain.per_s(1000, now_s=19.9) == pytest.approx(545, rel=0.02)
    assert drain.per_s(1000, now_s=49.9) < 100  # nothing has left for half a minute


def test_an_idle_queue_tells_nothing_of_its_speed() -> None:
    drain = DrainRate()
    for step in range(100):
        drain.left(50, now_s=step * 10.0, is_backlogged=False)
    assert drain.per_s(1000, now_s=2000) == pytest.approx(1000)


RATES = Rates(base_s=0.01, prompt_token_s=1e-3, prompt_pair_s=1e-12, spread=0.1, num_steps=100)


def test_the_estimate_adds_up_what_is_ahead_what_is_in_front_and_its_own() -> None:
    estimate = expected_ttft(2000, 1000, 300, 100, RATES)
    assert (estimate.queue_s, estimate.worker_s) == (pytest.approx(2.8), pytest.approx(0.33, rel=1e-3))
    assert estimate.own_s == pytest.approx(0.121, rel=1e-3)
    assert expected_ttft(0, 1, 300, 0, replace(RATES, num_steps=0)).worker_s == pytest.approx(0.3, rel=1e-3)


def test_what_first_tokens_take_beyond_the_estimate_is_learnt_and_one_stall_is_no_rule() -> None:
    surplus = Surplus()
    for step in range(200):
        surplus.observe(0.2 if step % 2 else 0.3, now_s=step / 10)
    assert surplus.likely_s(20) == pytest.approx(0.25 + 2 * 0.05, rel=0.15)
    surplus.observe(30.0, now_s=20)
    assert surplus.likely_s(20) < 0.45
    for step in range(100):
        surplus.observe(2.0, now_s=20 + step / 10)
    assert surplus.likely_s(30) == pytest.approx(2.0, rel=0.1)


def test_a_surplus_that_nothing_confirms_locks_nobody_out() -> None:
    surplus = Surplus()
    for step in range(200):
        surplus.observe(5.0, now_s=step / 10)
    assert surplus.likely_s(20) > 4
    assert surplus.likely_s(40) < 0.2


@pytest.mark.parametrize(
    ("queue_s", "worker_s", "own_s", "is_clients_own", "refused"),
    [
        (0.0, 0.0, 5.0, False, False),  # a long prompt on an idle fleet
        (0.0, 0.0, 5.0, True, True),
        (0.0, 0.1, 0.5, False, False),
        (0.0, 0.1, 1.0, False, True),
        (1.1, 0.0, 0.0, False, True),
    ],
)
def test_who_cannot_be_in_time_is_refused(queue_s, worker_s, own_s, is_clients_own, refused) -> None:
    assert is_hopeless(Estimate(queue_s, worker_s, own_s), 1.0, is_clients_own) == refused


@pytest.mark.parametrize(("total_s", "expected"), [(1.2, 1), (4.5, 4), (1e9, 600)])
def test_retry_after_is_when_the_backlog_has_drained_far_enough(total_s, expected) -> None:
    assert retry_after_s(Estimate(total_s, 0, 0), 1.0) == expected


def test_a_tenants_share_is_what_the_file_says_of_it_else_the_default(tmp_path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(
        "default: {requests_per_minute: 60}\n"
        "tenants:\n  acme: {weight: 4, requests_per_minute: 0}\n  batch: {priority: 3}\n"
    )
    shares = read_shares(str(path))
    assert shares.of("acme") == Share(weight=4)
    assert shares.of("batch") == Share(priority=3, requests_per_minute=60)
    assert shares.of("nobody") == shares.of("") == Share(requests_per_minute=60)
    assert read_shares("").of("acme") == Share()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tenants: {acme: {wieght: 2}}", "acme.*wieght"),
        ("tenants: {acme: {weight: 0}}", "acme: weight must be positive"),
        ("default: {tokens_per_minute: -1}", "default: limits must not be negative"),
        ("default: {tokens_per_minute: 1.5}", "default"),
        ("tennants: {}", "tennants"),
        ("[1, 2", "tenants.yaml"),
    ],
)
def test_a_tenants_file_that_makes_no_sense_is_refused_in_a_line(tmp_path, text, words) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_shares(str(path))


def test_a_part_of_a_limit_is_never_none_and_of_none_never_one() -> None:
    share = Share(requests_per_minute=10, tokens_per_minute=0, max_concurrent=1)
    assert share.part(4) == Share(requests_per_minute=3, tokens_per_minute=0, max_concurrent=1)
