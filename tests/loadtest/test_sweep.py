"""One command sweeps rates over targets and leaves a report; what cannot be measured is said at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.plan import LoadOptions, OptionError
from loadtest.send import Sweep, Target, parse_target
from tests.loadtest.stubs import loadtest, read_json, stub_server

_LOAD = ("--num-requests", "12", "--prompt-tokens", "20", "--output-tokens", "5")


def test_a_sweep_of_two_servers_reports_which_is_better(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    with stub_server("--token-s", "0.001") as fast, stub_server("--token-s", "0.6") as slow:
        out, err = loadtest(
            "sweep", "--target", f"slow={slow}/v1", "--target", f"fast={fast}", "--rates", "5,10",
            "--goodput", "tpot:300", "--output", str(folder), *_LOAD,
        )  # fmt: skip
        prompts = [[body["prompt"] for body in read_json(f"{url}/seen")["bodies"]] for url in (slow, fast)]  # type: ignore[attr-defined]
    assert out.strip() == str(folder / "report.html")
    assert "fast at 10/s: goodput" in err
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        "fast-10.json", "fast-5.json", "report.html", "requests.csv", "slow-10.json", "slow-5.json", "summary.csv",
        "summary.json", "summary.md",
    ]  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["verdict"]["winner"] == "fast"
    assert "fast is better" in (folder / "report.html").read_text()
    both = [sorted(map(tuple, each)) for each in prompts]
    assert both[0] == both[1], "both servers got the same requests"
    assert len(set(both[0])) == 32, "another rate has prompts of its own"
    again, _ = loadtest("report", *map(str, (folder / "runs").iterdir()), "--output", str(tmp_path / "again"))
    assert "fast is better" in Path(again.strip()).read_text()


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
    ("names", "rates"), [(("a", "a"), (1.0,)), ((), (1.0,)), (("a",), ()), (("a",), (2.0, 1.0)), (("a",), (0.0, 1.0))]
)
def test_a_sweep_that_makes_no_sense_is_refused(names: tuple[str, ...], rates: tuple[float, ...]) -> None:
    targets = tuple(Target(name, url="http://x") for name in names)
    with pytest.raises(OptionError):
        Sweep(targets, rates, LoadOptions(), (), Path("x"))


def test_a_stack_of_this_machine_is_started_measured_and_stopped(tmp_path: Path) -> None:
    """The real thing, once: `tandem up` with the demo model, its gauges, and its end."""
    loadtest(
        "sweep", "--target", "disaggregated", "--rates", "4", "--workload", "azure", "--scale", "0.1",
        "--output", str(tmp_path), "--num-requests", "8",
    )  # fmt: skip
    run = json.loads((tmp_path / "runs" / "disaggregated-4.json").read_text())
    assert run["summary"]["num_ok"] == 8, run["summary"]["first_error"]
    assert {each["process"] for each in run["samples"]} == {"decode-0", "prefill-0"}
    assert all(each["kv_usage"] is not None for each in run["samples"])
