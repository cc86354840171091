"""The report is one file that needs nothing from anywhere, and says who is better and by how much."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtest.figures import MachineUse, RunResult
from loadtest.plan import Origin, Outcome
from loadtest.report import this_commit, write_report
from loadtest.report.report import render
from loadtest.report.svg import (
    Chart,
    Series,
    draw,
    nice_step,
)
from tests.loadtest.factories import records, result, some_good

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
    """Two targets at two rates, the second of which overloads one of them."""
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
    html = render(runs())
    checker = check(html)
    assert not [value for name, value in checker.attributes if name in ("src", "href", "xlink:href", "action")]
    assert not [value for _, value in checker.attributes if value and "//" in value]
    assert not re.search(r"//|@import|url\(", html[: html.index("<body>")])
    assert not re.search(r"<(script|link|img|iframe|object)\b", html)
    assert html.count("<svg") == 5 + 2 * 8, "five charts over the rates, eight for each rate"
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_page_says_who_is_better_and_by_how_much() -> None:
    html = render(runs())
    text = " ".join(check(html).text)
    assert "disaggregated is better: it kept 90 % of its requests good up to 10 requests/s" in text
    assert "colocated <old> up to 5 (not at 10): 2.0 times" in text
    assert "time to first token ≤ 1000 ms and time per output token ≤ 100 ms" in text
    assert '<div class="verdict clear">' in html


def test_the_page_fits_a_phone_and_a_dark_room() -> None:
    """What can be known without a browser: nothing has a width that a phone lacks, and every colour has a dark one."""
    html = render(runs())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    style = html[html.index("<style>") : html.index("</style>")]
    widths = [int(number) for number in re.findall(r"(?<!max-)width: (\d+)px", style)]
    assert all(number < 390 for number in widths)
    assert all("min(100%" in each for each in re.findall(r"minmax\([^;]*px", style)), "a column may be narrower"
    assert not re.search(r"<svg[^>]* width=", html), "charts are as wide as their column"
    phone = style[style.index("@media (max-width") :]
    assert "thead { display: none; }" in phone
    assert "content: attr(data-head)" in phone
    cells = re.findall(r"<td[^>]*>", html)
    assert cells
    assert all("data-head=" in cell for cell in cells), "on a phone a figure's head stands beside it"
    light, dark = style.split("prefers-color-scheme: dark", 1)
    names = set(re.findall(r"(--[a-z0-9-]+):", light))
    assert names == set(re.findall(r"(--[a-z0-9-]+):", dark[: dark.index("* {")]))
    body = html[html.index("<body>") :]
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) <= names
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b", body), "no colour outside of the style sheet"


def verdict_of(html: str) -> str:
    """The box at the page's head."""
    return html[html.index('<div class="verdict') :].split("</div>", 1)[0]


def test_nobody_healthy_is_grey_and_nothing_is_marked_as_best() -> None:
    slow = [result(name, 10.0, some_good(40, 10.0, good)) for name, good in (("a", 0.8), ("b", 0.1))]
    html = render(slow)
    assert verdict_of(html).startswith('<div class="verdict none"><p class="label">No verdict</p>')
    assert 'class="best"' not in html
    assert html.count('<tr class="weak">') + html.count('<tr class="first weak">') == 2


def test_only_the_healthy_are_best_and_only_beyond_the_noise() -> None:
    """The overloaded one answers few, and these fast: that is no merit."""
    few = [
        each if each.index % 5 == 0 else replace(each, outcome=Outcome.REFUSED)
        for each in records(40, 10.0, ttft_s=0.05)
    ]
    html = render([result("steady", 10.0, records(40, 10.0, 0.3)), result("refuses", 10.0, few)])
    rows = re.findall(r"<tr.*?</tr>", html[html.index("All figures") :], re.DOTALL)
    (steady,) = [row for row in rows if "steady" in row and "TTFT p50" in row and "goodput" in row]
    (refuses,) = [row for row in rows if "refuses" in row and "TTFT p50" in row and "goodput" in row]
    assert 'data-head="goodput, req/s" class="best"' in steady
    assert 'class="best"' not in refuses


def test_what_is_better_than_nothing_is_the_best() -> None:
    made = [result("some", 10.0, records(40, 10.0, 0.3)), result("none", 10.0, some_good(40, 10.0, 0.0))]
    html = render(made)
    assert html[html.index("All figures") :].count('data-head="goodput, req/s" class="best"') == 1


def test_a_busy_machine_makes_the_verdict_amber_and_says_so_beside_it() -> None:
    made = [replace(each, machine_use=MachineUse(2, 1.5, 0.2)) for each in runs()]
    html = render(made)
    assert verdict_of(html).startswith('<div class="verdict doubtful"><p class="label">Verdict, with doubts</p>')
    assert "others used 10% of the processors" in verdict_of(html)
    assert html.index("<h2>Doubts</h2>") < html.index("Over the rates")
    assert "at most 75% used by the test and its servers, 10% by others" in html


def test_doubts_are_a_table_before_the_figures() -> None:
    late = [replace(each, sent_s=each.scheduled_s + 0.2) if each.index == 3 else each for each in records(9, 9.0, 0.4)]
    run = replace(result("a", 9.0, late), num_planned=10, notes=("worker w went away",))
    html = render([run])
    table = html[html.index("<h2>Doubts</h2>") : html.index("Over the rates")]
    assert re.findall(r'data-head="doubt"[^>]*><span>([^<]*)<', table) == ["sent late", "cut short", "note"]
    assert "1 of 9 requests, by at most 200 ms" in table
    assert "1 requests have no record" in table
    assert "worker w went away" in table
    assert "<h2>Doubts</h2>" not in render(runs()), "without doubts there is no table of them"


def test_many_doubts_are_folded_away_but_for_the_first_which_are_about_what_was_compared() -> None:
    made = []
    for rate in range(1, 12):
        (run,) = [each for each in runs() if each.target == "disaggregated" and each.options.rate == 5.0]
        options = replace(run.options, rate=float(rate))
        made.append(replace(run, options=options, turn=int(rate == 11), machine_use=MachineUse(2, 1.0, 0.3)))
    table = render(made).split("<h2>Doubts</h2>")[1].split("Over the rates")[0]
    seen, folded = table.split("<details>")
    assert re.findall(r'data-head="rate"><span>([^<]*)<', seen)[0] == "11/s"
    assert (seen.count("machine busy"), folded.count("machine busy")) == (8, 3)
    assert "<summary>3 more</summary>" in folded


def lines_of(html: str, title: str) -> tuple[list[ElementTree.Element], ElementTree.Element]:
    """A chart's dotted lines, and the chart."""
    (svg,) = [each for each in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if f'aria-label="{title}' in each]
    chart = ElementTree.fromstring(svg)
    return [each for each in chart if each.attrib.get("class") == "level"], chart


@pytest.mark.parametrize(
    ("title", "objective"),
    [("TTFT: p50", "ttft:700"), ("TPOT: p50", "tpot:80"), ("ITL p99 of", "itl:90")],
)
def test_an_objective_is_a_line_in_the_chart_that_it_is_about_and_in_no_other(title: str, objective: str) -> None:
    html = render([result("a", 10.0, records(40, 10.0, ttft_s=0.2), objective)])
    titles = ("TTFT: p50", "TPOT: p50", "ITL p99 of a request: p50")
    found = [each for each in titles if lines_of(html, each)[0]]
    assert [each.startswith(title) for each in found] == [True]
    (line,), chart = lines_of(html, found[0])
    height = float(line.attrib["y1"])
    dots = [float(each.attrib["cy"]) for each in chart if each.tag == "circle"]
    assert all(0 < height < dot for dot in dots), "what is below the objective is drawn below its line"
    assert f"objective: {objective.split(':')[1]} ms" in "".join(chart.itertext())


def test_an_objective_beyond_the_data_is_not_drawn_at_the_edge_of_the_data() -> None:
    """The axis reaches as far as the line: else everything would seem to be at the objective."""
    chart = Chart("t", "x", "y", log_y=True, y_line=1000.0, line_name="objective")
    svg = ElementTree.fromstring(draw(chart, [Series("s", "#000", ((1.0, 20.0), (2.0, 40.0)), dots=True)]))
    (line,) = [each for each in svg if each.attrib.get("class") == "level"]
    top = min(float(each.attrib["cy"]) for each in svg if each.tag == "circle")
    assert float(line.attrib["y1"]) < top - 40


def test_the_page_says_what_ran_so_that_it_can_be_run_again() -> None:
    origin = Origin("python -m loadtest sweep --seed 7", "abc123", "2 CPUs (some chip)", 7)
    facts = {"kernels": "amx", "dtype of keys and values": "bfloat16", "lane": "cma", "version": "0.1.0"}
    made = [
        replace(each, origin=origin, server_command="tandem up --prefill 1", server_facts=facts, started_unix_s=1e9)
        for each in runs()
    ]
    text = " ".join(check(render(made)).text)
    for expected in (
        "python -m loadtest sweep --seed 7", "abc123", "2 CPUs (some chip)", "tandem up --prefill 1", "kernels amx",
        "dtype of keys and values bfloat16", "lane cma", "2001-09-09 01:46", "--goodput ttft:1000,tpot:100",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_commit_is_that_of_our_source_and_not_of_whoever_installed_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@x")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "site-packages" / "report.py"
    source.parent.mkdir()
    source.touch()
    assert this_commit(source) == "", "no checkout"
    git("init")
    git("commit", "--allow-empty", "--message", "theirs")
    assert this_commit(source) == "", "a checkout that does not have this file"
    git("add", ".")
    git("commit", "--message", "ours")
    commit = this_commit(source)
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    source.write_text("changed")
    assert this_commit(source) == f"{commit}-dirty"


def test_rates_that_were_only_searched_have_no_chapter_of_their_own() -> None:
    search = [replace(each, turn=0) for each in runs() if each.options.rate == 5.0]
    compared = [each for each in runs() if each.options.rate == 10.0]
    html = render([*search, *compared])
    assert re.findall(r"<summary>([^<]*)<", html) == ["10 requests/s"]
    assert "5/s (search)" in html


def test_a_run_in_which_nothing_was_answered_still_makes_a_page(tmp_path: Path) -> None:
    html = write_report(tmp_path, [replace(result("a", 9.0, records(9, 9.0, 0.4)), records=(), samples=())]).read_text()
    check(html)
    assert "nothing measured" in html
    assert not lines_of(html, "TTFT: p50")[0], "no line without an axis"


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
    assert table[2] == "| 5.00 | disaggregated | 5.00 | 100% | 200 / 200 | 50.0 / 50.0 | 50 | 24 | 0 / 0 / 0 |"
    assert len(table) == 6
    assert {line.count("|") for line in table} == {10}
    document = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert document["verdict"]["winner"] == "disaggregated"
    assert len(document["runs"]) == 4


def test_there_is_no_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path, [])


def test_runs_that_cannot_be_compared_are_no_report(tmp_path: Path) -> None:
    one, other = runs()[:2]
    easier = replace(other, options=replace(other.options, goodput="ttft:9000"))
    with pytest.raises(ValueError, match=r"different objectives.*ttft:1000,tpot:100; ttft:9000"):
        write_report(tmp_path, [one, easier])
    with pytest.raises(ValueError, match="different workloads"):
        write_report(tmp_path, [one, replace(other, workload="something else")])


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
