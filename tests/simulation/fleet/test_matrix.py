"""A decode worker is killed, or drained, at each token of a stream, by real services under the seeded loop."""

from __future__ import annotations

import pytest

from tests.simulation.fleet.matrix import KINDS, NUM_TOKENS, How, simulate_matrix


@pytest.mark.parametrize("step", [2 * len(KINDS), pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["kill", "drain"])
def test_a_stream_whose_worker_goes_at_any_token_is_the_undisturbed_one(how: How, step: int) -> None:
    """By default each kind has its own two tokens at which that happens; killed and drained ones together are all."""
    reason, first = {"kill": ("lost", 0), "drain": ("moved", len(KINDS))}[how]
    for number, kind in enumerate(KINDS, start=first):
        indices = range(1 + number % step, NUM_TOKENS + 1, step)
        report = simulate_matrix(kind, how, indices)
        assert report.violations == (), (kind, indices)
        # Of the last tokens' streams some have been said when the news of the end comes.
        assert report.reached[f"{how}: {reason}"] >= len(indices) // 2, kind
