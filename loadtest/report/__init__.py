"""Shows a run to a person: the page, its charts and tables, the terminal."""

from loadtest.report.console import RunProgress, SweepProgress, summary_lines
from loadtest.report.report import this_commit, this_machine, write_report

__all__ = ["RunProgress", "SweepProgress", "summary_lines", "this_commit", "this_machine", "write_report"]
