"""Turns records and samples of a run into figures: percentiles, goodput, series over time, a verdict."""

from loadtest.figures.result import RunResult, read_result, write_result
from loadtest.figures.scrape import Scraper
from loadtest.figures.summary import Spread, Summary, summarize
from loadtest.figures.tables import write_tables
from loadtest.figures.timeline import in_flight, kv_usage, tokens_per_second, waiting
from loadtest.figures.verdict import Verdict, compare, judge

__all__ = [
    "RunResult",
    "Scraper",
    "Spread",
    "Summary",
    "Verdict",
    "compare",
    "in_flight",
    "judge",
    "kv_usage",
    "read_result",
    "summarize",
    "tokens_per_second",
    "waiting",
    "write_result",
    "write_tables",
]
