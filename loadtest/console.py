"""What a terminal shows of a run: counts while it is under way, figures as a few lines of text when it has ended."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest import dispatch
from loadtest.result import RunResult
from loadtest.summary import Spread, Summary


class RunProgress:
    """A bar on a terminal; nothing where there is none."""

    def __init__(self, console: Console, name: str) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[in_flight]} in flight, {task.fields[late]} late"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task(name, total=None, in_flight=0, late=0)

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def show(self, progress: dispatch.Progress) -> None:
        self._bars.update(
            self._task,
            total=progress.num_planned,
            completed=progress.num_done,
            in_flight=progress.num_in_flight,
            late=progress.num_late,
        )


def summary_lines(result: RunResult, summary: Summary) -> list[str]:
    """What a person wants to know first, and all that casts doubt on it."""
    lines = [
        f"{summary.target}: {summary.num_ok} of {summary.num_requests} requests answered in "
        f"{summary.duration_s:.1f} s, {summary.num_refusals} refused, {summary.num_errors} errors; {result.workload}",
        f"offered {summary.offered_rate:.2f}/s, answered {summary.request_rate:.2f}/s, "
        f"{summary.output_token_rate:.1f} output tokens/s, {summary.total_token_rate:.1f} tokens/s in all",
        f"goodput {summary.goodput:.2f}/s ({summary.good:.0%} of the requests): {result.options.slo}",
        f"{'ms':<6}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}",
    ]
    spreads = {"TTFT": summary.ttft, "TPOT": summary.tpot, "ITL": summary.itl, "E2E": summary.e2e}
    lines += [f"{name:<6}" + "".join(map(_cell, _values(spread))) for name, spread in spreads.items()]
    if summary.num_late:
        lines.append(
            f"{summary.num_late} requests were sent late (at most {summary.latest_send_s * 1000:.0f} ms): this client "
            "was too slow. Their latencies count from when they were due."
        )
    if summary.num_lost:
        lines.append(f"{summary.num_lost} requests have no record: the run was cut short")
    if summary.first_error:
        lines.append(f"first error: {summary.first_error}")
    return [*lines, *result.notes]


def _values(spread: Spread) -> tuple[float | None, ...]:
    return spread.mean, spread.p50, spread.p90, spread.p95, spread.p99


def _cell(value_s: float | None) -> str:
    return f"{'-' if value_s is None else format(value_s * 1000, '.1f'):>10}"
