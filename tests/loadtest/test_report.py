"""The report is one file that needs nothing from anywhere, and says who is better and by how much."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtest.figures import RunResult
from loadtest.report import write_report
from loadtest.report.report import render
from loadtest.report.svg import (
    Chart,
    Series,
    draw,
    nice_step,
)
from tests.loadtest.factories import records, result

_VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Every element is closed, in order; the text and the attributes are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def runs() -> list[RunResult]:
    made = []
    for target, ttft_s in (("disaggregated", 0.2), ("colocated <old>", 0.4)):
        for rate in (5.0, 10.0):
            slow = [
                replace(each, first_token_s=each.scheduled_s + 3, finished_s=each.scheduled_s + 4)
                if target != "disaggregated" and rate == 10.0 and each.index % 2
                else each
                for each in records(20, rate, ttft_s)
            ]
            made.append(result(target, rate, slow))
    return made


def test_the_page_parses_and_needs_nothing_from_outside() -> None:
    html = render(runs(), "2 CPUs")
    checker = check(html)
    assert not [value for name, value in checker.attributes if name in ("src", "href", "xlink:href", "action")]
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html)
    assert html.count("<svg") == 4 + 2 * 8, "four charts over the rates, eight for each rate"
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_page_says_who_is_better_and_by_how_much() -> None:
    text = " ".join(check(render(runs(), "2 CPUs")).text)
    assert "disaggregated is better than colocated <old> by a factor of 2.00" in text
    assert "10.00 against 5.00 requests/s within the objectives" in text
    assert "time to first token ≤ 1000 ms and time per output token ≤ 100 ms" in text
    assert "2 CPUs" in text


def test_doubts_are_shown_before_the_figures() -> None:
    late = [replace(each, sent_s=each.scheduled_s + 0.2) if each.index == 3 else each for each in records(9, 9.0, 0.4)]
    run = replace(result("a", 9.0, late), num_planned=10, notes=("worker w went away",))
    html = render([run], "here")
    assert "a at 9/s: 1 of 9 requests, by at most 200 ms" in html
    assert "1 requests without a record" in html
    assert html.index("worker w went away") < html.index("Over the rates")


def test_a_run_in_which_nothing_was_answered_still_makes_a_page(tmp_path: Path) -> None:
    html = write_report(tmp_path, [replace(result("a", 9.0, records(9, 9.0, 0.4)), records=(), samples=())]).read_text()
    check(html)
    assert "nothing measured" in html


def test_the_tables_beside_the_page_have_every_run_and_every_request(tmp_path: Path) -> None:
    write_report(tmp_path / "new", runs())
    with (tmp_path / "new" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["target"], rows[0]["rate"]) == ("disaggregated", "5.0")
    assert float(rows[0]["ttft_p90_s"]) == pytest.approx(0.2)
    with (tmp_path / "new" / "requests.csv").open() as file:
        requests = list(csv.DictReader(file))
    assert len(requests) == 80
    assert {row["good"] for row in requests} == {"True", "False"}
    table = (tmp_path / "new" / "summary.md").read_text().splitlines()
    assert table[2] == "| 5.00 | disaggregated | 5.00 | 100% | 200 / 200 | 50 / 50 | 50 | 24 | 0 / 0 / 0 |"
    assert len(table) == 6
    assert {line.count("|") for line in table} == {10}
    document = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert document["verdict"]["winner"] == "disaggregated"
    assert len(document["runs"]) == 4


def test_there_is_no_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path, [])


def test_a_chart_keeps_its_points_within_its_frame() -> None:
    chart = Chart("t", "x", "y", log_x=True, x_min=1.0, y_max=100.0, x_line=5000.0)
    svg = ElementTree.fromstring(draw(chart, [Series("s", "#000", ((1e-6, 0.0), (3.0, 50.0), (70.0, 120.0)))]))
    line = next(each for each in svg if each.tag == "polyline")
    corners = [tuple(map(float, corner.split(","))) for corner in line.attrib["points"].split()]
    assert len(corners) == 3
    assert all(0 <= x <= chart.width and 0 <= y <= chart.height for x, y in corners)
    assert corners == sorted(corners)


@pytest.mark.parametrize(("roughly", "step"), [(0.9, 1), (1.0, 1), (1.1, 2), (0.03, 0.05), (7.0, 10), (300, 500)])
def test_steps_of_an_axis_are_round(roughly: float, step: float) -> None:
    assert nice_step(roughly) == pytest.approx(step)
