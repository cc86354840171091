"""What can be checked of the comparison without installing a tool: the pins, the paced server, the arithmetic."""

from __future__ import annotations

import json
import re
import time

import httpx
import pytest

from tests.compat.__main__ import CHECKS
from tests.compat.agreement import OURS, PACED_TPOT_MS, PACED_TTFT_MS, compare, paced_target
from tests.compat.load import Figures, Load
from tests.compat.tool import REQUIREMENTS


def test_every_requirement_is_one_exact_version():
    assert {path.stem for path in REQUIREMENTS.iterdir()} == {check.tool.name for check in CHECKS}
    for check in CHECKS:
        lines = (REQUIREMENTS / f"{check.tool.name}.txt").read_text().splitlines()
        assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+(\[\w+\])?==[A-Za-z0-9.]+", line)] == []
        assert check.tool.version


def test_the_paced_server_keeps_its_timetable():
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    with paced_target() as target, httpx.Client(base_url=target.url, timeout=20) as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == target.model
        assert http.get("/nothing").status_code == 404
        begun = time.monotonic()
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = [(time.monotonic() - begun, line) for line in response.iter_lines() if line]
    assert [line for _, line in lines][-1] == "data: [DONE]"
    chunks = [(at, json.loads(line.removeprefix("data: "))) for at, line in lines[:-1]]
    assert [len(chunk["choices"]) for _, chunk in chunks] == [1, 1, 1, 1, 0]
    assert chunks[3][1]["choices"][0]["finish_reason"] == "length"
    assert chunks[4][1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert chunks[0][0] >= PACED_TTFT_MS / 1000  # not before its time; how much later is this machine's business
    assert chunks[3][0] >= (PACED_TTFT_MS + 3 * PACED_TPOT_MS) / 1000


def test_the_comparison_takes_the_best_rounds_and_finds_the_farthest_ratio():
    def rounds(*ttft_ms: float) -> list[Figures]:
        return [Figures(4, 0, 8, value, 20.0, 100.0) for value in ttft_ms]

    table, farthest = compare("t", {OURS: rounds(210, 200, 900), "other": rounds(999, 206, 230)})
    assert farthest == pytest.approx(0.03)
    assert list(table.columns[2].cells) == ["1.000", "1.030"]


def test_a_failed_request_a_short_answer_and_a_figure_of_nothing_fail():
    load = Load(num_requests=40, rate=1, prompt_tokens=10, output_tokens=2)
    Figures(40, 0, 80, 200.0, 20.0, 100.0).check(load)
    Figures(39, 0, 78, 200.0, 20.0, 100.0).check(load)
    for wrong in (
        Figures(39, 1, 78, 200.0, 20.0, 100.0),
        Figures(37, 0, 74, 200.0, 20.0, 100.0),
        Figures(40, 0, 79, 200.0, 20.0, 100.0),
        Figures(40, 0, 80, 0.0, 20.0, 100.0),
    ):
        with pytest.raises(AssertionError):
            wrong.check(load)
