"""One command sweeps rates over targets and leaves a report; what cannot be measured is said at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.figures import Level, RunResult, cases, judge
from loadtest.plan import Job, LoadOptions, OptionError
from loadtest.send import Sweep, SweepWatcher, Target, machine_watch, parse_target, run_sweep
from loadtest.send.machine_watch import MachineWatch
from tests.loadtest.factories import result, some_good
from tests.loadtest.stubs import TIMEOUT_S, loadtest, read_json, start, stub_server

_LOAD = ("--num-requests", "24", "--prompt-tokens", "20", "--output-tokens", "5")


def test_a_sweep_of_two_servers_reports_which_is_better(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    with stub_server("--token-s", "0.001") as fast, stub_server("--token-s", "0.6") as slow:
        out, err = loadtest(
            "sweep", "--target", f"slow={slow}/v1", "--target", f"fast={fast}", "--rates", "10,20",
            "--goodput", "tpot:300", "--late-ms", "60000", "--output", str(folder), *_LOAD,
        )  # fmt: skip
        prompts = [[body["prompt"] for body in read_json(f"{url}/seen")["bodies"]] for url in (slow, fast)]  # type: ignore[attr-defined]
    assert out.strip() == str(folder / "report.html")
    assert "fast at 20/s: goodput" in err
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        "fast-10.json", "fast-20.json", "report.html", "requests.csv", "slow-10.json", "slow-20.json", "summary.csv",
        "summary.json", "summary.md",
    ]  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["verdict"]["winner"] == "fast"
    assert "fast is better" in (folder / "report.html").read_text()
    both = [sorted(map(tuple, each)) for each in prompts]
    assert both[0] == both[1], "both servers got the same requests"
    assert len(set(both[0])) == 56, "another rate has prompts of its own"
    again, _ = loadtest("report", *map(str, (folder / "runs").iterdir()), "--output", str(tmp_path / "again"))
    assert "fast is better" in Path(again.strip()).read_text()


_ONE_KIND = (
    "--warmup-requests",
    "0",
    "--late-ms",
    "60000",
    "--prompt-tokens",
    "20",
    "--output-tokens",
    "3",
    "--goodput",
    "ttft:60000",
)


def test_a_rate_at_which_nothing_is_answered_is_a_result_and_no_failure(tmp_path: Path) -> None:
    flags = ("--rates", "20,40", "--num-requests", "6", *_ONE_KIND, "--output", str(tmp_path))
    with stub_server("--fail", *map(str, range(6, 12))) as url:
        _, err = loadtest("sweep", "--target", f"falls={url}", *flags)
    assert "falls kept 90 % of its requests good up to 20 requests/s (not at 40)" in err
    with stub_server("--fail", *map(str, range(12))) as url:
        _, err = loadtest("sweep", "--target", f"dead={url}", *flags, status=1)
    assert "No verdict: no target answered any request" in err


def test_a_sweep_that_is_interrupted_leaves_a_report_of_what_it_has(tmp_path: Path) -> None:
    with stub_server() as url:
        flags = ("--target", f"one={url}", "--rates", "10,20", "--num-requests", "6", *_ONE_KIND)
        flags = (*flags, "--output", str(tmp_path), "--rounds", "90")
        with start("loadtest", "sweep", *flags) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "one at 10/s" in line:
                    process.send_signal(signal.SIGINT)
                    break
            _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, err
    assert f"incomplete: {tmp_path / 'report.html'}" in err
    assert "one kept" in (tmp_path / "report.html").read_text()


def test_a_dead_server_fails_the_sweep_before_it_begins(tmp_path: Path) -> None:
    with stub_server() as url:
        flags = ("--target", f"alive={url}", "--target", "dead=http://127.0.0.1:9", "--output", str(tmp_path / "x"))
        _, err = loadtest("sweep", *flags, *_LOAD, status=1)
        assert "dead: no answer from http://127.0.0.1:9" in err
        assert read_json(f"{url}/seen")["arrivals"] == []


def test_targets_are_presets_urls_or_flags() -> None:
    assert parse_target("colocated").up_flags == ("--colocated", "--decode", "2")
    assert parse_target("vllm=http://host:8000/v1/") == Target("vllm", url="http://host:8000")
    assert parse_target("big=--prefill 2 --model 'a b'") == Target("big", up_flags=("--prefill", "2", "--model", "a b"))


@pytest.mark.parametrize("text", ["", "nonsense", "=http://x", "a=", "a=host:80"])
def test_what_is_no_target_is_named(text: str) -> None:
    with pytest.raises(OptionError, match="--target"):
        parse_target(text)


@pytest.mark.parametrize(
    ("names", "rates"), [(("a", "a"), (1.0,)), ((), (1.0,)), (("a",), (2.0, 1.0)), (("a",), (0.0, 1.0))]
)
def test_a_sweep_that_makes_no_sense_is_refused(names: tuple[str, ...], rates: tuple[float, ...]) -> None:
    targets = tuple(Target(name, url="http://x") for name in names)
    with pytest.raises(OptionError):
        Sweep(targets, rates, LoadOptions(), (), Path("x"))


class Pretended:
    """Runs in no time: each target keeps up with a rate, and beyond it answers late."""

    def __init__(self, **capacity: float) -> None:
        self.capacity = capacity
        self.jobs: list[Job] = []

    def run(self, job: Job, watch: object) -> RunResult:
        self.jobs.append(job)
        options = job.options
        good = 1.0 if options.rate <= self.capacity[job.target] or options.num_requests == 1 else 0.3
        number = options.total_requests
        made = [
            replace(each, is_warmup=each.index < options.warmup_requests)
            for each in some_good(number, options.rate, good)
        ]
        run = result(job.target, options.rate, made, options.goodput)
        return replace(run, options=options, turn=job.turn, origin=job.origin)


def pretended_sweep(tmp_path: Path, pretended: Pretended, **settings: object) -> list[RunResult]:
    with stub_server() as url:
        targets = tuple(Target(name, url=url) for name in pretended.capacity)
        sweep = Sweep(targets, (), LoadOptions(goodput="ttft:1000"), (), tmp_path, 2)
        return run_sweep(replace(sweep, **settings), pretended.run, "", SweepWatcher())  # type: ignore[arg-type]


def test_rates_are_found_and_then_compared_taking_turns(tmp_path: Path) -> None:
    pretended = Pretended(one=3.5, two=1.3)
    results = pretended_sweep(tmp_path, pretended)
    compared = [(each.target, each.options.rate, each.turn) for each in results if each.turn]
    assert compared == [
        ("two", 1.2, 1), ("two", 3.3, 1), ("one", 1.2, 1), ("one", 3.3, 1),
        ("one", 1.2, 2), ("one", 3.3, 2), ("two", 1.2, 2), ("two", 3.3, 2),
    ]  # fmt: skip
    found = judge(cases(results))
    assert (found.winner, found.factor) == ("one", pytest.approx(3.3 / 1.2))
    assert [(each.target, each.healthy_rate, each.next_rate) for each in found.standings] == [
        ("one", 3.3, 3.9), ("two", 1.2, 1.5),
    ]  # fmt: skip


def test_no_run_repeats_the_prompts_of_another_and_targets_get_the_same(tmp_path: Path) -> None:
    pretended = Pretended(one=3.5, two=3.5)
    pretended_sweep(tmp_path, pretended)
    runs = [(job.target, job.options.seed, job.options.rate, job.turn) for job in pretended.jobs]
    seeds = {(rate, turn, seed) for _, seed, rate, turn in runs if rate != 10.0}
    assert len({seed for _, _, seed in seeds}) == len({(rate, turn) for rate, turn, _ in seeds}) == len(seeds)


def test_objectives_come_from_lone_requests_where_none_are_named(tmp_path: Path) -> None:
    pretended = Pretended(one=3.5)
    results = pretended_sweep(tmp_path, pretended, sets_objectives=True)
    lone, others = pretended.jobs[:6], pretended.jobs[6:]
    assert {(job.options.total_requests, job.options.arrivals) for job in lone} == {(1, "constant")}
    assert len({job.options.seed for job in lone}) == 6, "none finds the prompt of another in a cache"
    assert {job.options.goodput for job in others} == {"ttft:1000,itl:300"}
    assert {each.options.goodput for each in results} == {"ttft:1000,itl:300"}
    assert all(len(each.measured) >= 12 for each in results)


def test_a_sweep_does_not_leave_its_results_among_those_of_an_earlier_one(tmp_path: Path) -> None:
    pretended_sweep(tmp_path, Pretended(one=3.5))
    pretended_sweep(tmp_path, Pretended(two=3.5), rates=(1.0,), rounds=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two-1-2.json", "two-1.json"]


def test_rates_that_are_given_are_run_as_they_are(tmp_path: Path) -> None:
    pretended = Pretended(one=3.5, two=3.5)
    results = pretended_sweep(tmp_path, pretended, rates=(1.0, 2.0), rounds=1)
    assert [(each.target, each.options.rate, each.turn) for each in results] == [
        ("one", 1.0, 1), ("one", 2.0, 1), ("two", 1.0, 1), ("two", 2.0, 1),
    ]  # fmt: skip
    assert len(pretended.jobs) == 4


def test_nobody_who_keeps_up_with_anything_ends_in_no_verdict(tmp_path: Path) -> None:
    results = pretended_sweep(tmp_path, Pretended(one=0.0, two=0.0))
    assert not [each for each in results if each.turn]
    assert judge(cases(results)).level is Level.NONE


def test_a_machine_watch_tells_our_processes_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's work is ours, and what nobody is known to have done is others'."""
    monkeypatch.setattr(machine_watch, "_QUOTA", tmp_path / "cpu.max")
    watch = MachineWatch()
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", f"{burn}\nprint(flush=True)\ninput()"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        use = watch.use()
        child.communicate(b"\n")
    assert use is not None
    assert use.num_processors >= 1
    assert use.ours > 0
    assert 0 <= use.others <= use.num_processors * 1.1
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert MachineWatch().use() is None, "a container with a quota cannot tell"


def test_a_stack_of_this_machine_is_started_measured_and_stopped(tmp_path: Path) -> None:
    """The real thing, once: `tandem up` with the demo model, its gauges, and its end."""
    loadtest(
        "sweep", "--target", "disaggregated", "--up-model", "demo", "--rates", "4",
        "--goodput", "ttft:2000", "--workload", "azure", "--scale", "0.1",
        "--output", str(tmp_path), "--num-requests", "8",
    )  # fmt: skip
    run = json.loads((tmp_path / "runs" / "disaggregated-4.json").read_text())
    assert run["summary"]["num_ok"] == 8, run["summary"]["first_error"]
    assert {each["process"] for each in run["samples"]} == {"decode-0", "prefill-0"}
    assert run["server_command"].startswith("tandem up --served-model-name loadtest --prefill 1")
    assert {"device", "kernels", "dtype of keys and values", "lane", "version"} <= set(run["server_facts"])
    assert run["machine_use"] is None or run["machine_use"]["ours"] > 0
    assert all(each["kv_usage"] is not None for each in run["samples"])
