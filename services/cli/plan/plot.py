"""Draws what was tried, over the size of the fleet: a page of HTML with charts, and nothing that it has to fetch."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from loadtest.report import STYLE, Chart, Series, draw
from services.planner import Outcomes, Search, Workload

_SIZE = "workers"


def page(search: Search, workload: Workload) -> str:
    """The page."""
    objectives = next(iter(search.tried.values())).objectives
    charts = [
        draw(
            Chart("Good requests", _SIZE, "% of requests", y_max=100.0, y_line=100 * search.good, line_name="wanted"),
            _lines(search, lambda each: 100 * each.good),
        ),
        draw(Chart("Goodput", _SIZE, "good requests/s"), _lines(search, lambda each: each.goodput)),
        draw(
            Chart("TTFT p90", _SIZE, "ms", log_y=True, y_line=objectives.ttft_s * 1e3, line_name="objective"),
            _lines(search, lambda each: each.ttft.p90 * 1e3),
        ),
        draw(
            Chart("TPOT p90", _SIZE, "ms", y_line=objectives.tpot_s * 1e3, line_name="objective"),
            _lines(search, lambda each: each.tpot.p90 * 1e3),
        ),
    ]
    title = f"Plan for {workload.description}, {workload.rate:.3g} a second"
    result = "No fleet is enough." if search.cheapest is None else f"The cheapest fleet: {search.cheapest}."
    legend = "".join(
        f'<span><i class="swatch" style="background:var(--c{place})"></i>{escape(kind)}</span>'
        for place, kind in enumerate(search.best)
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(result)} Each kind's line is its best"
        f' split of each size.</p><p class="legend">{legend}</p>'
        f'<div class="charts">{"".join(charts)}</div></body></html>'
    )


def _lines(search: Search, value: Callable[[Outcomes], float]) -> list[Series]:
    """A line for each kind of fleet, through the best one of each size."""
    lines = []
    for place, kind in enumerate(search.best):
        of_size: dict[int, Outcomes] = {}
        for shape, outcomes in search.tried.items():
            size = shape.num_workers
            if shape.kind == kind and (size not in of_size or outcomes.good > of_size[size].good):
                of_size[size] = outcomes
        points = tuple((float(size), value(of_size[size])) for size in sorted(of_size))
        lines.append(Series(kind, f"var(--c{place})", points, dots=True))
    return lines
