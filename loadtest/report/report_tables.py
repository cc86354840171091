"""Writes a report's tables: standings, doubts, all figures of all runs, and those of one rate by class of request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from loadtest.figures import HEALTHY, Case, Figure, Weight, as_ms, doubts_of, is_clearly_better, shown
from loadtest.report.page import Cell, Page, Row, table


@dataclass(frozen=True)
class _Column:
    head: str
    figure: Figure
    show: Callable[[float | None], str]
    lower_is_better: bool | None = None  # None: nothing to be better at


_NUM_DOUBTS_SHOWN = 8


def _whole(value: float | None) -> str:
    return shown(value)


def _hundredths(value: float | None) -> str:
    return shown(value, ",.2f")


def _ms(seconds: float | None) -> str:
    return shown(as_ms(seconds), ",.1f" if seconds is not None and seconds < 0.1 else ",.0f")


_COLUMNS = (
    _Column("goodput, req/s", lambda each: each.goodput, _hundredths, False),
    _Column("TTFT p50, ms", lambda each: each.ttft.p50, _ms, True),
    _Column("TTFT p90, ms", lambda each: each.ttft.p90, _ms, True),
    _Column("TPOT p50, ms", lambda each: each.tpot.p50, _ms, True),
    _Column("TPOT p90, ms", lambda each: each.tpot.p90, _ms, True),
    _Column("request's ITL p99: p90, ms", lambda each: each.request_itl.p90, _ms, True),
    _Column("all gaps p99, ms", lambda each: each.itl.p99, _ms, True),
    _Column("E2E p90, s", lambda each: each.e2e.p90, _hundredths, True),
    _Column("output tokens/s", lambda each: each.output_token_rate, _whole),
)


def standings_table(page: Page) -> str:
    """One line a target: how far it keeps up."""
    heads = ("target", f"highest rate with ≥ {HEALTHY:.0%} good", "lowest rate without", "goodput there", "good there")
    rows = []
    for each in page.verdict.standings:
        best = "best" if page.verdict.winner == each.target else ""
        there = next(
            (case for case in page.cases if (case.target, case.rate) == (each.target, each.healthy_rate)), None
        )
        cells = (
            Cell(page.name(each.target), "name"),
            Cell("none" if each.healthy_rate is None else f"{each.healthy_rate:g}/s", best),
            Cell("none tried" if each.next_rate is None else f"{each.next_rate:g}/s"),
            Cell("–" if each.goodput is None else f"{each.goodput:.2f}/s"),
            Cell("–" if there is None else _good(there)),
        )
        rows.append(Row(cells))
    return table(heads, rows)


def doubts_table(page: Page) -> str:
    """Every reason to doubt a figure, those about compared runs first, and the heaviest; empty where there is none."""
    cases = sorted(page.cases, key=lambda case: case.is_probe)
    doubts = sorted((doubt for case in cases for doubt in doubts_of(case)), key=lambda each: -each.weight)
    if not doubts:
        return ""
    means = {
        Weight.VOID: "voids a verdict that needs it",
        Weight.DOUBTFUL: "weakens a verdict that needs it",
        Weight.NOTE: "to be known",
    }
    rows = [
        Row(
            (
                Cell(escape(each.short), "name" if each.weight is Weight.NOTE else "name bad"),
                Cell(page.name(each.target), "name"),
                Cell(f"{each.rate:g}/s"),
                Cell(escape(each.text), "text"),
                Cell(means[each.weight], "text"),
            )
        )
        for each in doubts
    ]
    heads = ("doubt", "target", "rate", "what was seen", "what it does")
    first, more = rows[:_NUM_DOUBTS_SHOWN], rows[_NUM_DOUBTS_SHOWN:]
    folded = f"<details><summary>{len(more)} more</summary>{table(heads, more)}</details>" if more else ""
    return f"<h2>Doubts</h2>{table(heads, first)}{folded}"


def figures_table(page: Page) -> str:
    """Lists every target at every rate in a line, those of one rate together."""
    heads = (
        "rate",
        "target",
        "requests",
        "good, %",
        *(column.head for column in _COLUMNS),
        "refused",
        "errors",
        "late",
    )
    rows = []
    for rate in page.rates:
        group = page.at(rate)
        for index, case in enumerate(group):
            summary = case.summary
            kinds = ["first"] * (index == 0) + ["weak"] * (not summary.is_healthy)
            cells = (
                Cell(f"{rate:g}/s" + (" (search)" if case.is_probe else ""), "name"),
                Cell(page.name(case.target), "name"),
                Cell(f"{summary.num_requests}"),
                Cell(_good(case).removesuffix(" %")),
                *(_figure(column, case, group) for column in _COLUMNS),
                *(Cell(str(number)) for number in (summary.num_refusals, summary.num_errors, summary.num_late)),
            )
            rows.append(Row(cells, " ".join(kinds)))
    note = (
        f"Bold: best at this rate by 5 % or more and by more than the noise, with at least {HEALTHY:.0%} good. Grey: "
        f"less than {HEALTHY:.0%} good. Percentiles: of the requests that were answered. ±: with 95 % confidence."
    )
    return f'{table(heads, rows)}<p class="note">{note}</p>'


def _good(case: Case) -> str:
    """The share of good requests and how well it is known."""
    share = f"{case.summary.good * 100:.0f}"
    scatter = (case.good.high - case.good.low) / 2 if case.good else 0.0
    return f"{share} ± {scatter * 100:.0f} %" if scatter else f"{share} %"


def _figure(column: _Column, case: Case, group: Sequence[Case]) -> Cell:
    others = [each for each in group if each is not case]
    is_best = (
        column.lower_is_better is not None
        and case.summary.is_healthy
        and bool(others)
        and all(is_clearly_better(column.figure, case, other, column.lower_is_better) for other in others)
    )
    return Cell(column.show(column.figure(case.summary)), "best" if is_best else "")


def classes_table(page: Page, cases: Sequence[Case]) -> str:
    """The runs of one rate by class of request; empty where there is one class."""
    kinds = list(dict.fromkeys(each.kind for case in cases for each in case.summary.classes))
    if len(kinds) < 2:
        return ""
    heads: tuple[str, ...] = ("class", "target", "requests", "good, %", "TTFT p50, ms", "TTFT p90, ms", "TPOT p90, ms")
    heads = (*heads, "request's ITL p99: p90, ms", "refused", "errors")
    rows = []
    for kind in kinds:
        mine = [(case.target, each) for case in cases for each in case.summary.classes if each.kind == kind]
        for index, (target, each) in enumerate(mine):
            figures = (each.ttft.p50, each.ttft.p90, each.tpot.p90, each.request_itl.p90)
            texts = [str(each.num_requests), f"{each.good * 100:.0f}", *map(_ms, figures)]
            texts += [str(each.num_refusals), str(each.num_errors)]
            names = (Cell(escape(kind), "name"), Cell(page.name(target), "name"))
            rows.append(Row((*names, *map(Cell, texts)), "" if index else "first"))
    return table(heads, rows)
