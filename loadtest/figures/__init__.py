"""From what was noted to figures: percentiles, goodput, the servers' own series, a verdict."""

from loadtest.figures.result import RunResult, read_result, write_result
from loadtest.figures.scrape import Scraper
from loadtest.figures.summary import Spread, Summary, summarize
from loadtest.figures.tables import write_tables
from loadtest.figures.verdict import Verdict, compare, judge

__all__ = [
    "RunResult",
    "Scraper",
    "Spread",
    "Summary",
    "Verdict",
    "compare",
    "judge",
    "read_result",
    "summarize",
    "write_result",
    "write_tables",
]
