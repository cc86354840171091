"""The router's bench runs to its end."""

from __future__ import annotations

import math

import pytest

from tests.bench.bench_router import CASES, TARGETS, main


@pytest.mark.slow
def test_every_case_and_target_is_measured(capsys):
    main(["--num-requests", "1", "--concurrency", "1", "--repeats", "1", "--step-ms", "1"])
    lines = capsys.readouterr().out.splitlines()
    cases, targets = lines[1 : 1 + len(CASES)], lines[-len(TARGETS) :]
    assert [line[:40].rstrip() for line in cases] == list(CASES)
    assert all(float(line[40:].split()[0]) >= 0 for line in cases)
    assert [line[:44].rstrip() for line in targets] == list(TARGETS)
    assert all(math.isfinite(float(line[44:].split()[0].replace(",", ""))) for line in targets)
