"""Holds what all parts of a report's page share: runs, figures, colours of targets, the style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from loadtest.figures import RunResult, Summary, Verdict, judge, summarize
from loadtest.plan import Slo

# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
.verdict { font-size: 1.2rem; border-left: 6px solid #009E73; background: #f1f8f5; padding: 0.7rem 1rem; }
.doubt { border-left: 6px solid #E69F00; background: #fdf6e7; padding: 0.4rem 1rem; }
.note { color: #57606a; font-size: 0.9rem; }
table { margin: 0.8rem 0; border-collapse: collapse; font-size: 0.83rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.45rem; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap; }
th { font-weight: 600; background: #f6f8fa; vertical-align: bottom; }
td.name, th.name { text-align: left; } tr.first td { border-top: 2px solid #afb8c1; }
td.best { font-weight: 700; background: #e6f4ee; } .wide { overflow-x: auto; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin: 0 0.35em 0 0.2em; }
.legend { margin: 0.4rem 0; } .legend span { margin-right: 1.2rem; }
.charts { display: flex; flex-wrap: wrap; gap: 0.6rem; }
details { border: 1px solid #d8dee4; border-radius: 6px; margin: 0.5rem 0; padding: 0.4rem 0.8rem; }
summary { cursor: pointer; font-weight: 600; }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg .title { font-size: 13px; font-weight: 600; fill: #1b1f24; } svg .tick, svg .label { fill: #57606a; }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; } svg .grid { stroke: #e7ebef; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .level { stroke: #1b1f24; stroke-dasharray: 2 3; }
svg .shade { fill: #f1f3f5; } svg .none { text-anchor: middle; fill: #57606a; }
"""


@dataclass(frozen=True)
class Page:
    """Runs and figures, in the same order."""

    results: tuple[RunResult, ...]
    summaries: tuple[Summary, ...]
    verdict: Verdict
    colors: Mapping[str, str]

    @property
    def targets(self) -> list[str]:
        return list(self.colors)

    @property
    def rates(self) -> list[float]:
        return sorted({each.rate for each in self.summaries})

    @property
    def slo(self) -> Slo:
        return self.results[0].options.slo

    def at(self, rate: float) -> list[tuple[RunResult, Summary]]:
        both = zip(self.results, self.summaries, strict=True)
        return [(result, summary) for result, summary in both if summary.rate == rate]

    @classmethod
    def of(cls, results: Sequence[RunResult]) -> Page:
        summaries = tuple(map(summarize, results))
        targets = dict.fromkeys(each.target for each in results)
        colors = {target: _COLORS[index % len(_COLORS)] for index, target in enumerate(targets)}
        return cls(tuple(results), summaries, judge(summaries), colors)

    def name(self, target: str) -> str:
        """A target's name as HTML, its colour before it."""
        return f'<span class="swatch" style="background:{self.colors[target]}"></span>{escape(target)}'

    @property
    def legend(self) -> str:
        """Names every target in one line."""
        items = "".join(f"<span>{self.name(target)}</span>" for target in self.targets)
        return f'<div class="legend">{items}</div>'


def ms(seconds: float | None) -> float | None:
    """Milliseconds, where there is a figure."""
    return None if seconds is None else seconds * 1000
