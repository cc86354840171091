"""Draws a report's charts: figures over the rates, and distributions and timelines for each rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loadtest.figures import HEALTHY, Case, Summary, as_ms, in_flight, kv_usage, tokens_per_second, waiting
from loadtest.plan import RequestRecord
from loadtest.report.page import Page
from loadtest.report.svg import Chart, Series, draw

_NUM_CDF_POINTS = 200
_NUM_BINS = 60
_LOAD = "offered load, requests/s"
_QUIET = "var(--quiet)"


def rate_charts(page: Page) -> str:
    """Goodput, its share, and each latency that has an objective of its own, over the offered load."""
    highest = max(page.rates)
    ideal = Series("all requests good", _QUIET, ((0.0, 0.0), (highest, highest)), "4 4")
    share = Chart(
        "Requests within the objectives", _LOAD, "% of requests", y_max=100.0, y_line=HEALTHY * 100, line_name="90 %"
    )
    charts = [
        draw(
            Chart("Goodput (grey: every request good)", _LOAD, "good requests/s"),
            [ideal, *_over_rates(page, lambda each: each.goodput)],
        ),
        draw(share, _over_rates(page, lambda each: each.good * 100)),
        _latency(page, "TTFT", "ttft", lambda each: each.ttft.p50, lambda each: each.ttft.p90),
        _latency(page, "TPOT", "tpot", lambda each: each.tpot.p50, lambda each: each.tpot.p90),
        _latency(
            page,
            "ITL p99 of a request",
            "itl",
            lambda each: each.request_itl.p50,
            lambda each: each.request_itl.p90,
        ),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _over_rates(page: Page, value: Callable[[Summary], float | None], dash: str = "", suffix: str = "") -> list[Series]:
    series = []
    for target in page.targets:
        mine = [each.summary for each in page.cases if each.target == target]
        points = [(each.rate, known) for each in mine if (known := value(each)) is not None]
        series.append(Series(target + suffix, page.colors[target], tuple(sorted(points)), dash, dots=True))
    return series


def _latency(
    page: Page,
    name: str,
    objective: str,
    p50: Callable[[Summary], float | None],
    p90: Callable[[Summary], float | None],
) -> str:
    """A latency's p50 and p90 over requests. Its objective is met by 90 % where the solid line is below the dotted."""
    limit_ms = as_ms(dict(page.slo.limits_s).get(objective))
    chart = Chart(
        f"{name}: p50 dashed, p90 solid", _LOAD, "ms", log_y=True, y_line=limit_ms, line_name=_objective(limit_ms)
    )
    lines = _over_rates(page, lambda each: as_ms(p50(each)), "5 4", " p50")
    return draw(chart, [*lines, *_over_rates(page, lambda each: as_ms(p90(each)), "", " p90")])


def run_charts(page: Page, cases: Sequence[Case]) -> str:
    """Draws one rate: how latencies are distributed, and how the runs went over time."""
    return f'<div class="charts">{"".join([*_distributions(page, cases), *_timelines(page, cases)])}</div>'


def _distributions(page: Page, cases: Sequence[Case]) -> list[str]:
    limits = dict(page.slo.limits_s)
    gaps: tuple[str, str, Callable[[RequestRecord], float | None]]
    if "itl_max" in limits:
        gaps = "itl_max", "Longest gap of a request", lambda each: max(each.gaps_s, default=None)
    else:
        gaps = "itl", "ITL p99 of a request", lambda each: each.itl_s
    values = (
        ("ttft", "Time to first token", lambda each: each.ttft_s),
        ("tpot", "Time per output token", lambda each: each.tpot_s),
        gaps,
        ("e2el", "End to end", lambda each: each.e2e_s),
    )
    return [_distribution(page, cases, name, limits.get(objective), value) for objective, name, value in values]


def _distribution(
    page: Page,
    cases: Sequence[Case],
    name: str,
    limit_s: float | None,
    value: Callable[[RequestRecord], float | None],
) -> str:
    limit_ms = as_ms(limit_s)
    chart = Chart(
        name,
        "took at most, ms",
        "% of requests",
        log_x=True,
        x_min=1.0,
        y_max=100.0,
        x_line=limit_ms,
        line_name=_objective(limit_ms),
    )
    lines = [
        Series(case.target, page.colors[case.target], _cdf(map(value, (each for each in case.measured if each.ok))))
        for case in cases
    ]
    return draw(chart, lines)


def _objective(limit_ms: float | None) -> str:
    return "" if limit_ms is None else f"objective: {limit_ms:g} ms"


def _cdf(values_s: Iterable[float | None]) -> tuple[tuple[float, float], ...]:
    ordered = sorted(value * 1000 for value in values_s if value is not None)
    if not ordered:
        return ()
    last = len(ordered) - 1
    places = sorted({round(index * last / _NUM_CDF_POINTS) for index in range(_NUM_CDF_POINTS + 1)})
    return tuple((ordered[place], (place + 1) / len(ordered) * 100) for place in places)


def _timelines(page: Page, cases: Sequence[Case]) -> list[str]:
    """Of each target's first run at the rate."""
    runs = [case.runs[0] for case in cases]
    end_s = max((each.finished_s for run in runs for each in run.records), default=1.0)
    bin_s = max(1.0, end_s / _NUM_BINS)
    which = "" if all(len(case.runs) == 1 for case in cases) else ", first round"

    def chart(title: str, unit: str) -> Chart:
        return Chart(
            title + which, "s since the start (shaded: warm-up)", unit, x_max=end_s, shaded_to=runs[0].measured_from_s
        )

    tokens, queues, flight, usage = [], [], [], []
    for run in runs:
        color = page.colors[run.target]
        tokens.append(Series(run.target, color, tokens_per_second(run.records, bin_s)))
        flight.append(Series(run.target, color, in_flight(run.records, bin_s)))
        queues.append(Series(run.target, color, waiting(run.samples, bin_s)))
        roles = ("decode", "prefill") if any(each.process.startswith("prefill") for each in run.samples) else ("",)
        for role in roles:
            points = tuple((x, y * 100) for x, y in kv_usage(run.samples, role, bin_s))
            usage.append(Series(run.target, color, points, "5 4" if role == "prefill" else ""))
    return [
        draw(chart("Throughput", "output tokens/s"), tokens),
        draw(chart("Due and not answered", "requests"), flight),
        draw(chart("Waiting in the server's queues", "requests"), queues),
        draw(chart("KV blocks in use (dashed: prefill)", "% of the fullest worker"), usage),
    ]
