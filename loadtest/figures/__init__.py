"""Turns records and samples of a run into figures: percentiles, goodput, series over time, a verdict."""

from loadtest.figures.case import Case, Figure, cases
from loadtest.figures.doubts import Doubt, Weight, doubts_of
from loadtest.figures.result import MachineUse, RunResult, read_result, write_result
from loadtest.figures.scrape import Scraper, server_facts
from loadtest.figures.summary import HEALTHY, Spread, Summary, as_ms, shown, summarize
from loadtest.figures.tables import write_tables
from loadtest.figures.timeline import in_flight, kv_usage, tokens_per_second, waiting
from loadtest.figures.verdict import Level, Standing, Verdict, compare, is_clearly_better, judge

__all__ = [
    "HEALTHY",
    "Case",
    "Doubt",
    "Figure",
    "Level",
    "MachineUse",
    "RunResult",
    "Scraper",
    "Spread",
    "Standing",
    "Summary",
    "Verdict",
    "Weight",
    "as_ms",
    "cases",
    "compare",
    "doubts_of",
    "in_flight",
    "is_clearly_better",
    "judge",
    "kv_usage",
    "read_result",
    "server_facts",
    "shown",
    "summarize",
    "tokens_per_second",
    "waiting",
    "write_result",
    "write_tables",
]
