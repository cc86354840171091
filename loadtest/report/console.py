"""Prints a run to the terminal: counts while it is under way, figures when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.figures import RunResult, Spread, Summary, summarize
from loadtest.send import Progress as Counts
from loadtest.send import SweepWatcher, Target


class RunProgress:
    """A bar on a terminal; nothing where there is none."""

    def __init__(self, console: Console, name: str) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self.bars.add_task(name, total=None, note="")

    def __enter__(self) -> RunProgress:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bars.stop()

    def show(self, progress: Counts) -> None:
        self.bars.update(
            self._task,
            total=progress.num_planned,
            completed=progress.num_done,
            note=f"{progress.num_in_flight} in flight, {progress.num_late} late",
        )

    def rename(self, name: str) -> None:
        """Another run begins."""
        self.bars.update(self._task, description=name, total=None, completed=0, note="")


class SweepProgress(SweepWatcher):
    """Two bars on a terminal: all runs, and the one under way. A line for each run that has ended, everywhere."""

    def __init__(self, console: Console, num_runs: int | None) -> None:
        self._console = console
        self._run = RunProgress(console, "")
        self._all = self._run.bars.add_task("sweep", total=num_runs, note="")
        self.results: list[RunResult] = []

    def __enter__(self) -> SweepProgress:
        self._run.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._run.__exit__(kind, error, tb)

    def preparing(self, target: Target) -> None:
        self._run.rename(f"{target.name} starts")
        self._print(f"{target.name}: {target.description}")

    def says(self, line: str) -> None:
        self._print(line)

    def running(self, target: Target, rate: float) -> Callable[[Counts], None]:
        self._run.rename(f"{target.name} at {rate:g}/s")
        return self._run.show

    def finished(self, result: RunResult) -> None:
        self.results.append(result)
        self._run.bars.advance(self._all)
        summary = summarize(result)
        line = f"{summary.target} at {summary.rate:g}/s: goodput {summary.goodput:.2f}/s ({summary.good:.0%})"
        if summary.ttft.p90 is not None and summary.itl.p99 is not None:
            line += f", TTFT p90 {summary.ttft.p90 * 1000:.0f} ms, ITL p99 {summary.itl.p99 * 1000:.0f} ms"
        doubts = {"refused": summary.num_refusals, "errors": summary.num_errors, "late": summary.num_late}
        line += "".join(f", {number} {name}" for name, number in doubts.items() if number)
        if result.machine_use:
            line += f", others used {result.machine_use.others_share:.0%} of the processors"
        self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary_lines(result: RunResult, summary: Summary) -> list[str]:
    """Lists the first figures a person wants, and all that casts doubt on them."""
    lines = [
        f"{summary.target}: {summary.num_ok} of {summary.num_requests} requests answered in "
        f"{summary.duration_s:.1f} s, {summary.num_refusals} refused, {summary.num_errors} errors; {result.workload}",
        f"offered {summary.offered_rate:.2f}/s, answered {summary.request_rate:.2f}/s, "
        f"{summary.output_token_rate:.1f} output tokens/s, {summary.total_token_rate:.1f} tokens/s in all",
        f"goodput {summary.goodput:.2f}/s ({summary.good:.0%} of the requests): {result.options.slo}",
        f"{'ms':<8}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}",
    ]
    spreads = {"TTFT": summary.ttft, "TPOT": summary.tpot, "ITL": summary.itl}
    spreads |= {"ITL p99": summary.request_itl, "E2E": summary.e2e}  # within each request, as the objective itl is
    lines += [f"{name:<8}" + "".join(map(_cell, _values(spread))) for name, spread in spreads.items()]
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
