"""Shows a run to a person: the page, its charts and tables, the terminal."""

from loadtest.report.console import RunProgress, SweepProgress, summary_lines
from loadtest.report.page import STYLE
from loadtest.report.report import this_commit, this_machine, write_report
from loadtest.report.svg import Chart, Series, draw

__all__ = [
    "STYLE",
    "Chart",
    "RunProgress",
    "Series",
    "SweepProgress",
    "draw",
    "summary_lines",
    "this_commit",
    "this_machine",
    "write_report",
]
