"""Writes the report: one HTML page, without outside resources, that says which target is better."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path

from loadtest.figures import RunResult, compare, write_tables
from loadtest.report.page import STYLE, Page
from loadtest.report.report_charts import rate_charts, run_charts
from loadtest.report.report_tables import classes_table, figures_table


def write_report(folder: Path, results: Sequence[RunResult], machine: str = "") -> Path:
    """report.html and the tables beside it; returns the page's path. Raises ValueError where there is no result."""
    if not results:
        raise ValueError("no run has a result: there is nothing to report")
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, results)
    path = folder / "report.html"
    path.write_text(render(results, machine or this_machine()), encoding="utf-8")
    return path


def this_machine() -> str:
    """The machine that sends, and that also serves where stacks were started on it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} CPUs ({model}), {platform.system()} {platform.machine()}"


def render(results: Sequence[RunResult], machine: str) -> str:
    """The page."""
    page = Page.of(results)
    title = f"Load test: {' against '.join(page.targets)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(results[0].workload)}. Measured on {escape(machine)}.</p>',
        f'<p class="verdict"><strong>{escape(page.verdict.sentence)}</strong></p>',
        f"<p>A request counts as good if {escape(str(page.slo))}; <em>goodput</em> is good requests per second.</p>",
        _doubts(page),
        _standings(page),
        "<h2>Over the rates</h2>",
        page.legend,
        rate_charts(page),
        "<h2>All figures</h2>",
        figures_table(page),
        "<h2>Each rate in detail</h2>",
        *(_detail(page, rate, is_open=rate == _telling_rate(page)) for rate in page.rates),
        "<h2>How this was measured</h2>",
        _method(page),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'


def _doubts(page: Page) -> str:
    """Lists the reasons to doubt a figure."""
    doubts = []
    late = [each for each in page.summaries if each.num_late]
    if late:
        where = "; ".join(
            f"{each.target} at {each.rate:g}/s: {each.num_late} of {each.num_requests} requests, by at most "
            f"{each.latest_send_s * 1000:.0f} ms"
            for each in late
        )
        doubts.append(
            f"Requests left late, since the load generator was short of CPU ({where}). Latencies count from when a "
            "request was due, so they include it."
        )
    for result, summary in zip(page.results, page.summaries, strict=True):
        where = f"{summary.target} at {summary.rate:g}/s"
        if summary.num_errors:
            doubts.append(f"{where}: {summary.num_errors} errors, the first: {summary.first_error}")
        if summary.num_lost:
            doubts.append(f"{where}: {summary.num_lost} requests without a record: the run was cut short")
        doubts += [f"{where}: {note}" for note in result.notes]
    items = "".join(f"<li>{escape(doubt)}</li>" for doubt in doubts)
    return f'<div class="doubt"><ul>{items}</ul></div>' if doubts else ""


def _standings(page: Page) -> str:
    best = page.verdict.standings[0].best_goodput
    rows = []
    for index, each in enumerate(page.verdict.standings):
        mark = ' class="best"' if index == 0 and page.verdict.winner == each.target else ""
        of_best = f"{each.best_goodput / best:.0%}" if best else "–"
        healthy = f"{each.healthy_rate:g}/s" if each.healthy_rate is not None else "none tried"
        rows.append(
            f'<tr><td class="name">{page.name(each.target)}</td><td{mark}>'
            f"{each.best_goodput:.2f}/s</td><td>{of_best}</td><td>{each.at_rate:g}/s</td><td>{healthy}</td></tr>"
        )
    head = "".join(
        f"<th>{text}</th>"
        for text in ("highest goodput", "of the best", "at offered rate", "highest rate with ≥ 90 % good")
    )
    return f'<table><tr><th class="name">target</th>{head}</tr>{"".join(rows)}</table>'


def _telling_rate(page: Page) -> float:
    """The rate at which the targets' goodputs differ most; of one target, the highest."""

    def difference(rate: float) -> float:
        goodputs = [summary.goodput for _, summary in page.at(rate)]
        return max(goodputs) - min(goodputs)

    return max(page.rates, key=lambda rate: (difference(rate), rate))


def _detail(page: Page, rate: float, is_open: bool) -> str:
    runs = page.at(rate)
    comparisons = [
        compare("TTFT p90", {each.target: each.ttft.p90 for _, each in runs}),
        compare("TPOT p90", {each.target: each.tpot.p90 for _, each in runs}),
        compare("ITL p99", {each.target: each.itl.p99 for _, each in runs}),
        compare("end-to-end p90", {each.target: each.e2e.p90 for _, each in runs}),
    ]
    found = "; ".join(filter(None, comparisons))
    better = f"<p>At this rate: {escape(found)}.</p>" if found else ""
    content = better + page.legend + run_charts(page, runs) + classes_table(page, runs)
    return f"<details{' open' if is_open else ''}><summary>{rate:g} requests/s</summary>{content}</details>"


def _method(page: Page) -> str:
    first = page.results[0]
    options, measured = first.options, first.measured
    num_cut = max(result.num_cut for result in page.results)
    lengths = [(each.prompt_tokens, each.output_tokens) for each in page.summaries if each.num_ok]
    mean = f"{lengths[0][0]:.0f} prompt and {lengths[0][1]:.0f} output tokens on average" if lengths else "no answer"
    cut = f"{num_cut} requests of a run were cut to fit the model's context. " if num_cut else ""
    hits = ", ".join(f"{each.target} {each.cached_share:.0%}" for each in page.summaries if each.rate == page.rates[-1])
    servers = "; ".join(dict.fromkeys(f"{result.target}: model {result.model}" for result in page.results))
    items = (
        f"Open loop: requests leave when they are due, whether or not earlier ones have been answered. {len(measured)} "
        f"requests at {options.rate:g}/s, {mean}. {cut}The first {options.warmup_requests} are warm-up and left out.",
        "All latencies count from the time when a request was due. TTFT: to the first chunk with tokens. TPOT: from "
        "the first to the last token, over the number of tokens after the first. ITL: between one chunk and the next.",
        "At one rate all targets get the same requests at the same times. Goodput is good requests over the time in "
        "which they were due; token rates count to the last token.",
        f"Prompt tokens that the server took from a cache, at {page.rates[-1]:g}/s: {hits}.",
        f"Targets: {servers}.",
        "Beside this page: summary.csv and summary.md (a line per run), requests.csv (one per request), summary.json.",
    )
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
