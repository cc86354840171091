"""Writes the report: one HTML page, without outside resources, that says which target is better, or why it cannot."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from loadtest.figures import Level, RunResult, compare, write_tables
from loadtest.plan import settings_text
from loadtest.report.page import STYLE, Page
from loadtest.report.report_charts import rate_charts, run_charts
from loadtest.report.report_tables import classes_table, doubts_table, figures_table, standings_table

_GIT_TIMEOUT_S = 10.0
_LABELS = {
    Level.CLEAR: "Verdict",
    Level.DOUBTFUL: "Verdict, with doubts",
    Level.TIE: "No difference",
    Level.NONE: "No verdict",
}


def write_report(folder: Path, results: Sequence[RunResult]) -> Path:
    """report.html and the tables beside it; returns the path. Raises ValueError where there is no result, and for
    results that cannot be compared."""
    if not results:
        raise ValueError("no run has a result: there is nothing to report")
    for what, values in (
        ("objectives", {each.options.goodput for each in results}),
        ("workloads", {each.workload for each in results}),
    ):
        if len(values) > 1:
            raise ValueError(
                f"these runs have different {what}, which one page cannot have: {'; '.join(sorted(values))}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, results)
    path = folder / "report.html"
    path.write_text(render(results), encoding="utf-8")
    return path


def this_machine() -> str:
    """The machine that sends, and that also serves where stacks were started on it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} CPUs ({model}), {platform.system()} {platform.machine()}"


def this_commit(source: Path = Path(__file__)) -> str:
    """The commit of this source, with `-dirty` where it has been changed; "" where it is in no checkout, or installed
    into somebody else's."""
    return _git(source, "ls-files", source.name) and _git(source, "describe", "--always", "--dirty", "--exclude=*")


def _git(source: Path, *arguments: str) -> str:
    try:
        process = subprocess.run(
            ["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def render(results: Sequence[RunResult]) -> str:
    """The page."""
    page = Page.of(results)
    title = f"Load test: {' against '.join(page.targets)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(results[0].workload)}. {escape(_where_and_when(results))}</p>',
        _verdict(page),
        f"<p>A request is good if its {escape(str(page.slo))}; <em>goodput</em> is good requests per second.</p>",
        standings_table(page),
        doubts_table(page),
        "<h2>Over the rates</h2>",
        page.legend,
        rate_charts(page),
        "<h2>All figures</h2>",
        figures_table(page),
        "<h2>Each rate in detail</h2>",
        *(_detail(page, rate, is_open=rate == _telling_rate(page)) for rate in page.compared_rates),
        "<h2>What ran</h2>",
        _what_ran(page),
        "<h2>How this was measured</h2>",
        _method(page),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'


def _where_and_when(results: Sequence[RunResult]) -> str:
    machines = [each.origin.machine for each in results if each.origin.machine]
    day = time.strftime("%Y-%m-%d", time.gmtime(min(each.started_unix_s for each in results)))
    return f"Measured on {machines[0]}, {day}." if machines else f"Measured on {day}."


def _verdict(page: Page) -> str:
    verdict = page.verdict
    sentence = verdict.sentence.removeprefix("No verdict: ").removeprefix("No difference found: ")
    text = f'<p class="label">{_LABELS[verdict.level]}</p><p class="sentence">{escape(sentence)}</p>'
    if verdict.reservation:
        text += f'<p class="reservation"><strong>But:</strong> {escape(verdict.reservation)}.</p>'
    return f'<div class="verdict {verdict.level}">{text}</div>'


def _telling_rate(page: Page) -> float:
    """The rate at which the targets' goodputs differ most; of one target, the highest."""

    def difference(rate: float) -> float:
        goodputs = [each.summary.goodput for each in page.at(rate)]
        return max(goodputs) - min(goodputs)

    return max(page.compared_rates, key=lambda rate: (difference(rate), rate))


def _detail(page: Page, rate: float, is_open: bool) -> str:
    cases = page.at(rate)
    comparisons = [
        compare("TTFT p90", lambda each: each.ttft.p90, cases),
        compare("TPOT p90", lambda each: each.tpot.p90, cases),
        compare("a request's ITL p99, p90", lambda each: each.request_itl.p90, cases),
        compare("end-to-end p90", lambda each: each.e2e.p90, cases),
    ]
    found = "; ".join(filter(None, comparisons))
    better = f"<p>At this rate, beyond the noise: {escape(found)}.</p>" if found else ""
    content = better + page.legend + run_charts(page, cases) + classes_table(page, cases)
    return f"<details{' open' if is_open else ''}><summary>{rate:g} requests/s</summary>{content}</details>"


def _what_ran(page: Page) -> str:
    """What a reader needs to make these figures again."""
    first = page.results[0]
    began, ended = (time.gmtime(pick(each.started_unix_s for each in page.results)) for pick in (min, max))
    entries = {
        "command": f"<code>{escape(first.origin.command)}</code>" if first.origin.command else "",
        "commit": escape(first.origin.commit),
        "date": f"{time.strftime('%Y-%m-%d %H:%M', began)} to {time.strftime('%H:%M', ended)} UTC",
        "machine": escape(first.origin.machine),
        "load": f"<code>{escape(settings_text(first.options))}</code>",
        "seed": str(first.options.seed if first.origin.seed is None else first.origin.seed),
    }
    for target in page.targets:
        mine = [each for each in page.results if each.target == target]
        facts = {name: text for each in mine for name, text in each.server_facts.items()}
        told = "; ".join(f"{escape(name)} {escape(text)}" for name, text in facts.items())
        started = f"<code>{escape(mine[0].server_command)}</code>" if mine[0].server_command else escape(mine[0].url)
        entries[target] = f"{started}<br>model {escape(mine[0].model)}{'; ' + told if told else ''}"
    uses = [each.machine_use for each in page.results if each.machine_use]
    if uses:
        others = max(each.others_share for each in uses)
        ours = max(each.ours / each.num_processors for each in uses)
        entries["processors"] = f"at most {ours:.0%} used by the test and its servers, {others:.0%} by others"
    else:
        entries["processors"] = "others' use is not known: servers started elsewhere, or a container with a quota"
    items = "".join(f"<dt>{escape(name)}</dt><dd>{html}</dd>" for name, html in entries.items() if html)
    return f"<dl>{items}</dl>"


def _method(page: Page) -> str:
    num_cut = max(result.num_cut for result in page.results)
    answered = [each.summary for each in page.cases if each.summary.num_ok]
    lengths = (
        f"{answered[0].prompt_tokens:.0f} prompt and {answered[0].output_tokens:.0f} output tokens on average"
        if answered
        else "no answer"
    )
    cut = f" {num_cut} requests of a run were cut to fit the model's context." if num_cut else ""
    last = page.rates[-1]
    hits = ", ".join(f"{each.target} {each.summary.cached_share:.0%}" for each in page.at(last))
    items = [
        f"Open loop: requests leave when they are due, whether or not earlier ones have been answered; {lengths}.{cut} "
        f"The first {page.results[0].options.warmup_requests} of a run are warm-up and left out.",
        "All latencies count from the time when a request was due. TTFT: to the first chunk with tokens. TPOT: from "
        "the first to the last token, over the number of tokens after the first. ITL: between one chunk and the next; "
        "the objective itl is about the 99th percentile of a request's own gaps.",
        "At one rate all targets get the same requests at the same times. Goodput is good requests over the time in "
        "which they were due; token rates count to the last token.",
        "Noise: the runs at one rate are cut into up to eight stretches, and two targets are compared stretch by "
        "stretch (Student's t, 95 %). What does not exceed that is called no difference.",
        "Doubts: more than 1 % of the requests sent late, or more than 5 % of the processors used by others (other "
        "processes, and what the host took away), weaken a verdict; more than 10 % and 25 % void it.",
        f"Prompt tokens that the server took from a cache, at {last:g}/s: {hits}.",
        "Beside this page: summary.csv and summary.md (a line per target and rate), requests.csv (one per request), "
        "summary.json.",
    ]
    if any(each.is_probe for each in page.cases):
        items.insert(
            3,
            "Each target's highest rate was looked for by doubling, halving and bisecting, over rates 20 % apart, in "
            "shorter runs; then all targets were measured at the rates found, taking turns.",
        )
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
