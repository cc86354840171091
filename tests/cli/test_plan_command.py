"""`tandem plan`: traces of each format make plans, and what is wrong is said in a line, with status 2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.cli.main import main

FAST = {
    "base_s": 0.005, "prompt_token_s": 1e-5, "prompt_pair_s": 1e-9, "running_s": 1e-4, "context_token_s": 1e-8,
    "num_steps": 50.0,
}  # fmt: skip


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 100 * n, "input_length": 1200, "output_length": 20, "hash_ids": [0, 3 * n + 1, 3 * n + 2]}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:15:{n // 10:02d}.{n % 10}000000,{300 + n},{20 + n % 7}" for n in range(60)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    path = tmp_path / "agents.jsonl"
    session = [[0.0, 4000, 30, 0, -1, 0, 7.3], [6.0, 5000, 40, 4030, 0, 3.0, 2.0], [9.0, 5600, 10, 5040, 1, 1.0, 2.0]]
    path.write_text("".join(json.dumps({"session": n, "requests": session}) + "\n" for n in range(8)))
    return path


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"uptime": 3, "rates": FAST}))
    return path


def plan(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        status = main(["plan", *map(str, argv)])
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("trace", ["mooncake", "azure", "agents"])
def test_each_format_makes_a_plan(
    trace: str, rates: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(trace)
    args = ("--ttft", 300, "--tpot", 20, "--rates", rates, "--max-workers", 4, "--json")
    status, out, _ = plan(capsys, path, *args)
    result = json.loads(out)
    assert status == 0
    assert result["cheapest"] == result["best"]["colocated"] == "1 colocated"
    assert result["best"]["prefill and decode"] == "1P:1D"
    alone = result["tried"][0]
    assert alone["step_by_step"]
    assert alone["good"] >= 0.9
    assert 0 < alone["ttft_s"]["p50"] <= alone["ttft_s"]["p99"] < 0.3
    assert (alone["cached"] > 0) == (trace != "azure")
    assert plan(capsys, path, *args)[1] == out  # the same again


def test_people_get_a_table_and_charts(
    mooncake: Path, rates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    args = ("--rates", rates, "--rate", 25, "--scale", 0.5, "--good", 95, "--max-workers", 8, "--plot", page)
    status, out, err = plan(capsys, mooncake, "--ttft", 100, "--tpot", 12, *args)
    assert status == 0
    assert out.startswith("Cheapest: ")
    assert "TTFT p50/p90/p99 ms" in out
    assert "60 requests, lengths times 0.5, 25 a second" in err
    assert page.read_text().count("<svg") == 4


def test_no_fleet_is_enough(azure: Path, rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = plan(capsys, azure, "--ttft", 1, "--tpot", 20, "--rates", rates, "--max-workers", 2)
    assert status == 2
    assert "none of at most 2 workers is enough" in out
    assert "no fleet of at most 2 workers has 90 % of the requests good; the nearest is" in err


def wrong_uses(tmp_path: Path, good: Path, rates: Path) -> Sequence[tuple[tuple[object, ...], str]]:
    bad, cut, empty, unlearnt = (tmp_path / name for name in ("bad.jsonl", "cut.jsonl", "empty.jsonl", "none.json"))
    bad.write_text(good.read_text() + '{"timestamp": 1}\n')
    cut.write_text('{"session": 0, "requests": [[0.0, 10, 5, 0, -1]]}\n{"session": 1, "requests": [[1]]}\n')
    empty.write_text("")
    unlearnt.write_text("{}")
    objectives = ("--ttft", 100, "--tpot", 10)
    return [
        ((good, "--tpot", 10), "give --ttft: milliseconds to the first token"),
        (objectives, "give TRACE: requests"),
        ((tmp_path / "none.csv", *objectives), "cannot read the trace"),
        ((bad, *objectives), "bad.jsonl, line 61: no request of a Mooncake trace"),
        ((cut, *objectives), "cut.jsonl, line 2: no session of an agent"),
        ((empty, *objectives), "neither Mooncake's JSONL nor Azure's CSV nor agent sessions"),
        ((good, *objectives, "--rates", unlearnt), "has no rates"),
        ((good, *objectives, "--rates", bad), "--rates"),
        ((good, *objectives, "--profile", "tpu"), "tpu"),
        ((good, *objectives, "--good", 101), "--good"),
        ((good, *objectives, "--rates", rates, "--plot", tmp_path / "no" / "p.html"), "No such file or directory"),
    ]


def test_what_is_wrong_is_said_in_a_line(
    mooncake: Path, rates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, message in wrong_uses(tmp_path, mooncake, rates):
        status, _, err = plan(capsys, *argv)
        assert status == 2, argv
        assert message in err, (argv, err)
        assert "Traceback" not in err
