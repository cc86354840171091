"""Draws a report's charts: figures over the rates, and distributions and timelines for each rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loadtest.figures import RunResult, Summary, in_flight, kv_usage, tokens_per_second, waiting
from loadtest.plan import RequestRecord
from loadtest.report.page import Page, ms
from loadtest.report.svg import Chart, Series, draw

_NUM_CDF_POINTS = 200
_NUM_BINS = 60


def rate_charts(page: Page) -> str:
    """Goodput, its share, and the latencies that make it, each over the offered load."""
    limits = dict(page.slo.limits_s)
    label = "offered load, requests/s"

    def lines(value: Callable[[Summary], float | None], dash: str = "", suffix: str = "") -> list[Series]:
        series = []
        for target in page.targets:
            mine = [each for each in page.summaries if each.target == target]
            points = [(each.offered_rate, known) for each in mine if (known := value(each)) is not None]
            series.append(Series(target + suffix, page.colors[target], tuple(sorted(points)), dash, dots=True))
        return series

    highest = max(each.offered_rate for each in page.summaries)
    ideal = Series("all requests good", "#8c959f", ((0.0, 0.0), (highest, highest)), "4 4")
    charts = [
        draw(
            Chart("Goodput (dashed grey: every request good)", label, "good requests/s"),
            [ideal, *lines(lambda each: each.goodput)],
        ),
        draw(
            Chart("Requests within the objectives", label, "% of requests", y_max=100.0),
            lines(lambda each: each.good * 100),
        ),
        draw(
            Chart("Time to first token: p50 (dashed), p90 (solid)", label, "s", y_line=limits.get("ttft"), log_y=True),
            [*lines(lambda each: each.ttft.p50, "5 4", " p50"), *lines(lambda each: each.ttft.p90, "", " p90")],
        ),
        draw(
            Chart("Gap between chunks: p50 (dashed), p99 (solid)", label, "ms", log_y=True),
            [
                *lines(lambda each: ms(each.itl.p50), "5 4", " p50"),
                *lines(lambda each: ms(each.itl.p99), "", " p99"),
            ],
        ),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def run_charts(page: Page, runs: Sequence[tuple[RunResult, Summary]]) -> str:
    """Draws one rate: how latencies are distributed, and how the runs went over time."""
    return f'<div class="charts">{"".join([*_distributions(page, runs), *_timelines(page, runs)])}</div>'


def _distributions(page: Page, runs: Sequence[tuple[RunResult, Summary]]) -> list[str]:
    limits = dict(page.slo.limits_s)
    values: dict[str, tuple[str, Callable[[RequestRecord], Iterable[float | None]]]] = {
        "ttft": ("Time to first token", lambda each: (each.ttft_s,)),
        "itl_max": ("Gap between chunks (ITL)", lambda each: each.gaps_s),
        "tpot": ("Time per output token", lambda each: (each.tpot_s,)),
        "e2el": ("End to end", lambda each: (each.e2e_s,)),
    }
    charts = []
    for objective, (name, values_of) in values.items():
        unit = "% of gaps" if objective == "itl_max" else "% of requests"
        limit = limits.get(objective)
        chart = Chart(
            f"{name}: share that took at most …",
            "ms",
            unit,
            log_x=True,
            x_min=1.0,
            y_max=100.0,
            x_line=limit * 1000 if limit else None,
        )
        lines = []
        for run, _ in runs:
            known = [value * 1000 for each in run.measured if each.ok for value in values_of(each) if value is not None]
            lines.append(Series(run.target, page.colors[run.target], _cdf(known)))
        charts.append(draw(chart, lines))
    return charts


def _cdf(values: list[float]) -> tuple[tuple[float, float], ...]:
    ordered = sorted(values)
    if not ordered:
        return ()
    last = len(ordered) - 1
    places = sorted({round(index * last / _NUM_CDF_POINTS) for index in range(_NUM_CDF_POINTS + 1)})
    return tuple((ordered[place], (place + 1) / len(ordered) * 100) for place in places)


def _timelines(page: Page, runs: Sequence[tuple[RunResult, Summary]]) -> list[str]:
    end_s = max((each.finished_s for run, _ in runs for each in run.records), default=1.0)
    bin_s = max(1.0, end_s / _NUM_BINS)

    def chart(title: str, unit: str) -> Chart:
        begin_s = runs[0][0].measured_from_s
        return Chart(title, "s since the start (shaded: warm-up)", unit, x_max=end_s, shaded_to=begin_s)

    tokens, queues, flight, usage = [], [], [], []
    for run, _ in runs:
        color = page.colors[run.target]
        tokens.append(Series(run.target, color, tokens_per_second(run.records, bin_s)))
        flight.append(Series(run.target, color, in_flight(run.records, bin_s)))
        queues.append(Series(run.target, color, waiting(run.samples, bin_s)))
        roles = ("decode", "prefill") if any(each.process.startswith("prefill") for each in run.samples) else ("",)
        usage += [
            Series(
                run.target,
                color,
                tuple((x, y * 100) for x, y in kv_usage(run.samples, role, bin_s)),
                "5 4" if role == "prefill" else "",
            )
            for role in roles
        ]
    return [
        draw(chart("Throughput", "output tokens/s"), tokens),
        draw(chart("Requests due and not answered", "requests"), flight),
        draw(chart("Server's queues (requests waiting)", "requests"), queues),
        draw(chart("KV blocks in use, fullest worker (dashed: prefill)", "%"), usage),
    ]
