"""Writes a report's tables: all figures of all runs, and those of one rate by class of request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from loadtest.figures import RunResult, Summary
from loadtest.report.page import Page, ms


@dataclass(frozen=True)
class _Column:
    head: str
    value: Callable[[Summary], float | None]
    show: Callable[[float], str]
    lower_is_better: bool | None = None  # None: nothing to be better at


def _whole(value: float) -> str:
    return f"{value:,.0f}"


_COLUMNS = (
    _Column("offered,<br>req/s", lambda each: each.offered_rate, "{:.2f}".format),
    _Column("goodput,<br>req/s", lambda each: each.goodput, "{:.2f}".format, False),
    _Column("good,<br>%", lambda each: each.good * 100, _whole, False),
    _Column("TTFT p50,<br>ms", lambda each: ms(each.ttft.p50), _whole, True),
    _Column("TTFT p90,<br>ms", lambda each: ms(each.ttft.p90), _whole, True),
    _Column("TTFT p99,<br>ms", lambda each: ms(each.ttft.p99), _whole, True),
    _Column("TPOT p50,<br>ms", lambda each: ms(each.tpot.p50), "{:.1f}".format, True),
    _Column("TPOT p90,<br>ms", lambda each: ms(each.tpot.p90), "{:.1f}".format, True),
    _Column("ITL p99,<br>ms", lambda each: ms(each.itl.p99), "{:.1f}".format, True),
    _Column("E2E p90,<br>s", lambda each: each.e2e.p90, "{:.2f}".format, True),
    _Column("output<br>tokens/s", lambda each: each.output_token_rate, _whole),
)


def figures_table(page: Page) -> str:
    """Lists every run in a line, the runs of one rate together."""
    head = "".join(f"<th>{column.head}</th>" for column in _COLUMNS) + "<th>refused /<br>errors / late</th>"
    rows = []
    for rate in page.rates:
        group = [summary for _, summary in page.at(rate)]
        for index, summary in enumerate(group):
            cells = "".join(_cell(column, summary, group) for column in _COLUMNS)
            cells += f"<td>{summary.num_refusals} / {summary.num_errors} / {summary.num_late}</td>"
            name = f'<td class="name">{page.name(summary.target)}</td>'
            rows.append(f"{_row(index)}<td>{rate:g}</td>{name}{cells}</tr>")
    note = (
        '<p class="note">Bold: best at this rate by 5 % or more. Percentiles: of the requests that were answered.</p>'
    )
    table = f'<table><tr><th>rate</th><th class="name">target</th>{head}</tr>{"".join(rows)}</table>'
    return f'<div class="wide">{table}</div>{note}'


def _cell(column: _Column, summary: Summary, group: Sequence[Summary]) -> str:
    value = column.value(summary)
    if value is None:
        return "<td>–</td>"
    others = [known for each in group if each is not summary and (known := column.value(each)) is not None]
    is_best = False
    if column.lower_is_better is not None and others:
        low, high = (value, min(others)) if column.lower_is_better else (max(others), value)
        is_best = high > low * 1.05
    mark = ' class="best"' if is_best else ""
    return f"<td{mark}>{column.show(value)}</td>"


def _row(index_in_group: int) -> str:
    return "<tr>" if index_in_group else '<tr class="first">'


def classes_table(page: Page, runs: Sequence[tuple[RunResult, Summary]]) -> str:
    """The runs of one rate by class of request; empty where there is one class."""
    kinds = list(dict.fromkeys(each.kind for _, summary in runs for each in summary.classes))
    if len(kinds) < 2:
        return ""
    names = ("requests", "good, %", "TTFT p50, ms", "TTFT p90, ms", "TPOT p90, ms", "ITL p99, ms", "refused", "errors")
    rows = []
    for kind in kinds:
        mine = [(s.target, each) for _, s in runs for each in s.classes if each.kind == kind]
        for index, (target, each) in enumerate(mine):
            figures = (each.ttft.p50, each.ttft.p90, each.tpot.p90, each.itl.p99)
            cells = [str(each.num_requests), f"{each.good:.0%}".rstrip("%")]
            cells += ["–" if figure is None else f"{figure * 1000:,.0f}" for figure in figures]
            cells += [str(each.num_refusals), str(each.num_errors)]
            row = f'<td class="name">{escape(kind)}</td><td class="name">{page.name(target)}</td>'
            row += "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"{_row(index)}{row}</tr>")
    head = '<th class="name">class</th><th class="name">target</th>' + "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
