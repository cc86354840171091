"""The roster: who is believed to be alive, for every way in which Redis can fall short. Its time is the test's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.registry.roster import Roster, Sighting
from tests.worker_records import worker_record


def sighting(worker_id: str = "w", incarnation: str = "1", remaining_s: float = 5.0, **fields: object) -> Sighting:
    return Sighting(worker_record(worker_id=worker_id, incarnation=incarnation, **fields), remaining_s)


def names(roster: Roster) -> list[str]:
    return [f"{record.worker_id}/{record.incarnation}" for record in roster.records]


def test_workers_are_listed_in_order_of_id_with_their_latest_record():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting("b"), sighting("a")])
    roster.observe(1, [sighting("b", num_blocks=9), sighting("a")])
    assert names(roster) == ["a/1", "b/1"]
    assert roster.records[1].num_blocks == 9


def test_a_worker_missing_from_redis_stays_until_its_last_known_lease_ends():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting(remaining_s=5)])
    roster.observe(4.9, [])
    assert names(roster) == ["w/1"]
    assert roster.next_expiry_s() == 5
    roster.observe(5, [])
    assert names(roster) == []
    assert roster.next_expiry_s() == float("inf")


def test_after_a_flush_nobody_leaves_who_announces_itself_again_in_time():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting("a"), sighting("b")])
    roster.observe(1, [])
    roster.observe(2, [sighting("a")])
    assert names(roster) == ["a/1", "b/1"]
    roster.observe(6, [])
    assert names(roster) == ["a/1"]


def test_after_an_outage_everyone_has_a_grace_period_to_come_back():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting("a"), sighting("b")])
    roster.resume(1000)  # Redis was away; no lease could be seen to be renewed
    roster.observe(1000, [])
    assert names(roster) == ["a/1", "b/1"]
    roster.observe(1001, [sighting("b")])
    roster.observe(1005, [sighting("b")])
    assert names(roster) == ["b/1"]


def test_a_lease_of_before_the_outage_does_not_end_the_grace_period():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting("a"), sighting("b")])
    roster.resume(10)  # Redis is back with what it had written to disk: leases that have all but ended
    roster.observe(10, [sighting("a", remaining_s=0.5), sighting("b", remaining_s=0.5)])
    roster.observe(11, [])
    assert names(roster) == ["a/1", "b/1"]
    assert roster.next_expiry_s() == 15
    roster.observe(12, [sighting("b")])
    roster.observe(15, [])
    assert names(roster) == ["b/1"]


def test_a_goodbye_removes_at_once_but_only_the_incarnation_that_said_it():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting(incarnation="2")])
    roster.withdraw("w", "1")
    roster.withdraw("stranger", "2")
    assert names(roster) == ["w/2"]
    roster.withdraw("w", "2")
    assert names(roster) == []


def test_a_newer_incarnation_replaces_an_older_one_and_not_the_other_way_round():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting(incarnation="2")])
    roster.observe(1, [sighting(incarnation="1")])  # first to announce itself after a flush
    assert names(roster) == ["w/2"]
    roster.observe(2, [sighting(incarnation="3")])
    assert names(roster) == ["w/3"]


def test_an_older_incarnation_takes_over_once_the_newer_ones_lease_has_ended():
    roster = Roster(grace_s=5)
    roster.observe(0, [sighting(incarnation="2", remaining_s=5)])
    roster.observe(5, [sighting(incarnation="1")])
    assert names(roster) == ["w/1"]


@pytest.mark.parametrize("grace_s", [0.5, 5.0])
@given(steps=st.lists(st.tuples(st.floats(0.1, 3), st.sets(st.sampled_from("abc"))), max_size=20))
def test_a_worker_is_listed_exactly_as_long_as_its_last_sighting_promises(grace_s, steps):
    roster, now_s, until_s = Roster(grace_s), 0.0, {}
    for wait_s, seen in steps:
        now_s += wait_s
        roster.observe(now_s, [sighting(worker_id, remaining_s=2.0) for worker_id in seen])
        until_s.update(dict.fromkeys(seen, now_s + 2.0))
        assert [record.worker_id for record in roster.records] == sorted(
            w for w, end_s in until_s.items() if end_s > now_s
        )
