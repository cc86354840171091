"""Writes the files beside a report: runs as CSV and Markdown, requests as CSV, all figures as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from loadtest.figures.case import cases
from loadtest.figures.result import RunResult
from loadtest.figures.summary import Spread, Summary, as_ms, shown, summarize
from loadtest.figures.verdict import judge
from loadtest.plan import RequestRecord

_SPREADS = ("ttft", "tpot", "itl", "request_itl", "e2e")


def write_tables(folder: Path, results: Sequence[RunResult]) -> None:
    """summary.csv, summary.md, requests.csv and summary.json."""
    summaries = [summarize(result) for result in results]
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [_flat(summary) for summary in summaries]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "summary.md").write_text(_markdown(summaries), encoding="utf-8")
    with (folder / "requests.csv").open("w", newline="", encoding="utf-8") as file:
        requests = [_request_row(result, record) for result in results for record in result.records]
        writer = csv.DictWriter(file, list(requests[0]) if requests else [])
        writer.writeheader()
        writer.writerows(requests)
    document = {"verdict": asdict(judge(cases(results))), "runs": [each.to_json() for each in summaries]}
    (folder / "summary.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def _markdown(summaries: Sequence[Summary]) -> str:
    """The runs of one rate together, to be pasted into a page."""
    lines = [
        "| offered, req/s | target | goodput, req/s | good | TTFT p50 / p90, ms | TPOT p50 / p90, ms | ITL p99, ms "
        "| output tokens/s | refused / errors / late |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in sorted(summaries, key=lambda summary: summary.rate):
        cells = (
            f"{each.offered_rate:.2f}",
            each.target,
            f"{each.goodput:.2f}",
            f"{each.good:.0%}",
            f"{shown(as_ms(each.ttft.p50))} / {shown(as_ms(each.ttft.p90))}",
            f"{shown(as_ms(each.tpot.p50), ',.1f')} / {shown(as_ms(each.tpot.p90), ',.1f')}",
            shown(as_ms(each.itl.p99)),
            f"{each.output_token_rate:,.0f}",
            f"{each.num_refusals} / {each.num_errors} / {each.num_late}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _flat(summary: Summary) -> dict[str, object]:
    """A run as one line: each percentile a column, classes left to the JSON file."""
    row: dict[str, object] = {}
    for each in fields(summary):
        if each.name in _SPREADS:
            spread: Spread = getattr(summary, each.name)
            row |= {f"{each.name}_{name}_s": value for name, value in asdict(spread).items()}
        elif each.name != "classes":
            row[each.name] = getattr(summary, each.name)
    return row


def _request_row(result: RunResult, record: RequestRecord) -> dict[str, object]:
    row = {"target": result.target, "rate": result.options.rate} | record.to_dict()
    del row["gaps_s"]
    row |= {"ttft_s": record.ttft_s, "tpot_s": record.tpot_s, "e2e_s": record.e2e_s, "late_s": record.late_s}
    return row | {
        "itl_s": record.itl_s,
        "itl_max_s": max(record.gaps_s, default=None),
        "good": result.options.slo.is_met(record),
    }
