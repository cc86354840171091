"""One run against a stub server: every request at its time and in the figures, whatever becomes of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.figures import RunResult, read_result, summarize
from loadtest.plan import Outcome
from tests.loadtest.stubs import loadtest, read_json, stub_server

_LOAD = ("--prompt-tokens", "40", "--output-tokens", "6")


def run_against(url: str, folder: Path, *flags: str) -> RunResult:
    loadtest("run", "--url", url, "--json", str(folder / "run.json"), *_LOAD, *flags)
    return read_result(folder / "run.json")


def test_a_stalled_server_shows_as_a_queue_and_not_as_a_pause_in_sending(tmp_path: Path) -> None:
    """A client that waits for answers would send nothing during the stall, and have one slow request to show for it."""
    rate, stall_s = 20.0, 2.0
    with stub_server("--stall-after", "40", "--stall-s", str(stall_s), "--token-s", "0.001") as url:
        result = run_against(url, tmp_path, "--rate", "20", "--num-requests", "120", "--warmup-requests", "0")
        seen = read_json(f"{url}/seen")
    arrivals, stall = seen["arrivals"], seen["stall"]
    assert isinstance(arrivals, list)
    assert isinstance(stall, list)
    begin_s, end_s = stall
    num_during = sum(begin_s <= each < end_s for each in arrivals)
    assert len(arrivals) == 120
    assert num_during > rate * stall_s / 2, "sending went on"
    ttft = [each.ttft_s for each in result.measured]
    slow = [each for each in ttft if each is not None and each > stall_s / 4]
    assert len(slow) > num_during / 2, "those that were due during the stall waited for its end"
    assert max(slow) > stall_s * 0.8
    p99 = summarize(result).ttft.p99
    assert p99 is not None
    assert p99 > stall_s * 0.8
    assert len([each for each in slow if each < stall_s * 0.8]) > 5, "the later they were due, the shorter they waited"


def test_refusals_errors_and_cut_streams_are_told_apart_and_stop_nobody(tmp_path: Path) -> None:
    with stub_server("--refuse", "1", "5", "--fail", "2", "--cut", "3") as url:
        result = run_against(url, tmp_path, "--rate", "50", "--num-requests", "20", "--warmup-requests", "0")
    summary = summarize(result)
    assert (summary.num_requests, summary.num_ok, summary.num_refusals, summary.num_errors) == (20, 16, 2, 2)
    refused = [each for each in result.records if each.outcome is Outcome.REFUSED]
    assert all("503" in each.error and "full" in each.error for each in refused)
    assert summary.good == pytest.approx(0.8)


def test_a_slow_answer_holds_up_no_other(tmp_path: Path) -> None:
    with stub_server("--slow", "0", "--token-s", "0.02") as url:
        result = run_against(url, tmp_path, "--rate", "20", "--num-requests", "20", "--warmup-requests", "0")
    slowest, *others = sorted(result.measured, key=lambda each: each.finished_s, reverse=True)
    assert min(slowest.gaps_s) > 1.5, "its chunks have the times at which they came"
    assert slowest.finished_s - max(each.finished_s for each in others) > 2


def test_records_hold_tokens_gaps_and_usage_and_warm_up_is_left_out(tmp_path: Path) -> None:
    with stub_server() as url:
        flags = ("--rate", "50", "--num-requests", "10", "--warmup-requests", "5")
        result = run_against(url, tmp_path, *flags, "--metrics-url", f"stub={url}/metrics")
        bodies = read_json(f"{url}/seen")["bodies"]
    assert isinstance(bodies, list)
    assert len(result.records) == len(bodies) == 15
    assert [each.index for each in result.measured] == list(range(5, 15))
    for record in result.measured:
        assert record.ok
        assert (record.num_prompt_tokens, record.num_output_tokens, len(record.gaps_s)) == (40, 6, 5)
        assert record.first_token_s is not None
        assert record.scheduled_s <= record.sent_s < record.first_token_s < record.finished_s
        assert sum(record.gaps_s) == pytest.approx(record.finished_s - record.first_token_s)
    assert all(len(body["prompt"]) == 40 and body["max_tokens"] == 6 for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == 15, "random prompts share nothing"
    assert result.samples
    assert {(each.process, each.running, each.waiting, each.kv_usage) for each in result.samples} == {
        ("stub", 3.0, 1.0, 0.25)
    }


def test_two_runs_of_one_seed_send_the_same_requests_at_the_same_times(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        with stub_server() as url:
            flags = ("--rate", "100", "--num-requests", "10", "--workload", "azure", "--scale", "0.05", "--seed", "7")
            result = run_against(url, tmp_path, *flags)
            bodies = read_json(f"{url}/seen")["bodies"]
        assert isinstance(bodies, list)
        times = sorted((each.index, each.scheduled_s) for each in result.records)
        runs.append((times, sorted(json.dumps(body) for body in bodies)))
    assert runs[0] == runs[1]


def test_a_dead_target_is_named_and_fails(tmp_path: Path) -> None:
    _, err = loadtest("run", "--url", "http://127.0.0.1:9", status=1)
    assert "no answer from http://127.0.0.1:9/v1/models" in err
    with stub_server() as url:
        _, err = loadtest("run", "--url", url, "--model", "nobody", status=1)
        assert "no model 'nobody'; it has stub" in err
        _, err = loadtest("run", "--url", f"{url}/not-here", status=1)
        assert "answers 404" in err


def test_a_flag_that_makes_no_sense_is_named_and_gives_status_2() -> None:
    _, err = loadtest("run", "--url", "http://127.0.0.1:9", "--rate", "0", status=2)
    assert "--rate must be positive" in err
