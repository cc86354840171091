"""Holds what all parts of a report's page share: cases, colours of targets, tables, the style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from loadtest.figures import Case, RunResult, Verdict, cases, judge
from loadtest.plan import Slo

# The style sheet has so many colours of targets, for light and for dark.
_NUM_COLORS = 6
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Page:
    """Runs, and what was made of them."""

    results: tuple[RunResult, ...]
    cases: tuple[Case, ...]
    verdict: Verdict
    colors: Mapping[str, str]

    @property
    def targets(self) -> list[str]:
        return list(self.colors)

    @property
    def rates(self) -> list[float]:
        return sorted({each.rate for each in self.cases})

    @property
    def compared_rates(self) -> list[float]:
        """Without those that only helped to find the others."""
        return sorted({each.rate for each in self.cases if not each.is_probe}) or self.rates

    @property
    def slo(self) -> Slo:
        return self.results[0].options.slo

    def at(self, rate: float) -> list[Case]:
        return [each for each in self.cases if each.rate == rate]

    @classmethod
    def of(cls, results: Sequence[RunResult]) -> Page:
        made = tuple(cases(results))
        targets = dict.fromkeys(each.target for each in results)
        colors = {target: f"var(--c{index % _NUM_COLORS})" for index, target in enumerate(targets)}
        return cls(tuple(results), made, judge(made), colors)

    def name(self, target: str) -> str:
        """A target's name as HTML, its colour before it."""
        return f'<span class="swatch" style="background:{self.colors[target]}"></span>{escape(target)}'

    @property
    def legend(self) -> str:
        """Names every target in one line."""
        items = "".join(f"<span>{self.name(target)}</span>" for target in self.targets)
        return f'<div class="legend">{items}</div>'


@dataclass(frozen=True)
class Cell:
    """One cell as HTML. `kind` is a class of the style sheet: name, best, weak."""

    html: str
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """`kind` is a class of the style sheet: first (of a group), weak."""

    cells: Sequence[Cell]
    kind: str = ""


def table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A table; on a phone each row is a card, in which each figure has its head beside it."""
    first = rows[0].cells if rows else [Cell("")] * len(heads)
    top = "".join(f"<th{_class(cell.kind)}>{escape(head)}</th>" for head, cell in zip(heads, first, strict=True))
    body = "".join(
        f"<tr{_class(row.kind)}>"
        + "".join(
            f'<td data-head="{escape(head)}"{_class(cell.kind)}><span>{cell.html}</span></td>'
            for head, cell in zip(heads, row.cells, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
