"""Every state that a connection can reach within small bounds is right, and leads to rest."""

from __future__ import annotations

import pytest

from tests.simulation.exhaustive import SMALL, Bounds, search
from tests.simulation.joint import Transfer
from tests.simulation.removals import REMOVALS
from tests.simulation.watching import all_transitions


def test_in_every_state_within_reach_the_invariants_hold_and_every_entry_of_the_tables_is_met():
    num_states, met = 0, set[str]()
    for bounds in SMALL:
        found = search(bounds)
        assert not found.violation, "\n".join((str(bounds), *found.story, found.violation))
        num_states += found.num_states
        met |= set(found.met)
    assert num_states > 15_000
    assert met == all_transitions()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lease-not-checked", "may be used, its lease is"),
        ("destination-reused-early", "is quiesced while"),
        ("abort-misses-a-state", "goes on after its abort"),
        ("drain-without-end", "what must happen goes in a circle"),
    ],
)
def test_a_missing_safeguard_is_found_with_its_shortest_story(name: str, says: str):
    with REMOVALS[name].take_out():
        found = search(Bounds((Transfer(0, 2),), two_sided=False, num_faults=1))
    assert says in found.violation
    assert found.story
