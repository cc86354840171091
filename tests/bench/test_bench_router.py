"""The router's bench runs to its end."""

from __future__ import annotations

from tests.bench.bench_router import CASES, main


def test_every_case_is_measured(capsys):
    main(["--num-requests", "1", "--concurrency", "1", "--repeats", "1", "--step-ms", "1"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:40].rstrip() for line in lines] == list(CASES)
    assert all(float(line[40:].split()[0]) >= 0 for line in lines)
