"""A decode worker is killed, or drained, at each token of a stream, by real services under the seeded loop."""

from __future__ import annotations

import pytest

from tests.simulation.fleet.matrix import KINDS, NUM_TOKENS, How, Kind, simulate_matrix


def check(kind: Kind, how: How, indices: range) -> None:
    report = simulate_matrix(kind, how, indices)
    assert report.violations == (), (kind, indices)
    # Of the last tokens' streams some have been said when the news of the end comes.
    reason = {"kill": "lost", "drain": "moved"}[how]
    assert report.reached[f"{how}: {reason}"] >= (len(indices) + 1) // 2, (kind, indices)


@pytest.mark.parametrize(("how", "first"), [("kill", 1), ("drain", 2)])
def test_a_stream_whose_worker_goes_is_the_undisturbed_one(how: How, first: int) -> None:
    """Each kind has a token of its own at which that happens. Those that nobody kills are drained: with either, any two
    of a kind's four properties meet."""
    for number, kind in enumerate(KINDS):
        if number.bit_count() % 2 == (how == "drain"):
            index = first + 3 * number
            check(kind, how, range(index, index + 1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "drain"])
def test_a_stream_whose_worker_goes_at_any_token_is_the_undisturbed_one(how: How) -> None:
    for kind in KINDS:
        check(kind, how, range(1, NUM_TOKENS + 1))
