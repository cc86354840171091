"""What the handoff's bench makes of what it has measured."""

from __future__ import annotations

import pytest

from tests.bench.bench_handoff import print_handoffs, print_rest, summarize
from tests.bench.handoff_client import Handoff


def handoff(read_ms: float, join_ms: float = 1.0) -> Handoff:
    return Handoff(16, read_ms / 1e3, 0.001, join_ms / 1e3, 0.5)


def test_a_row_has_medians_and_the_whole_handoff_without_the_join_where_streams_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {"512": [handoff(3.0), handoff(4.0), handoff(9.0)]}
    print_handoffs(found, "idle")
    print_handoffs(found, "loaded")
    idle, loaded = capsys.readouterr().out.split("Handoffs, loaded; targets: p50 5 ms, p99 15 ms")
    assert "| 512 | 3 | 16 | 4.0 | 1.0 | 1.0 | 6.0 | 11.0 |" in idle
    assert "| all | 3 | 16 | 4.0 | 1.0 | 1.0 | 6.0 | 11.0 |" in idle
    assert "| 512 | 3 | 16 | 4.0 | 1.0 | 1.0 | 5.0 | 10.0 |" in loaded


def test_what_streams_and_first_tokens_bear_stands_beside_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    print_rest(summarize({"2,048": [handoff(5.0)]}, [[0.010] * 100, [0.010] * 50 + [0.016] * 50]))
    out = capsys.readouterr().out
    assert "of TTFT at 2,048 tokens | 1.00% | 1 % |" in out
    assert "| 16.0 ms, 1.60x of 10.0 ms without (100 gaps) | 1.2x |" in out
