"""Puts what was tried into a table for people, and into JSON."""

from __future__ import annotations

import math

from services.planner import Outcomes, Percentiles, Search

_HEAD = ("fleet", "workers", "good %", "TTFT p50/p90/p99 ms", "TPOT p50/p90/p99 ms", "ITL p99", "good/s", "busy P/D %")


def table(search: Search) -> str:
    """The cheapest fleet of each kind, and all that was tried."""
    lines = []
    for kind, shape in search.best.items():
        if shape is None:
            lines.append(f"{kind}: none of at most {search.max_workers} workers is enough")
        else:
            outcomes = search.outcomes(shape)
            lines.append(f"{kind}: {shape} ({shape.num_workers} workers), {outcomes.good:.1%} good")
    if search.cheapest is not None:
        lines.insert(0, f"Cheapest: {search.cheapest}, {search.cheapest.num_workers} workers.")
    best = set(search.best.values())
    order = sorted(search.tried, key=lambda shape: (shape.num_workers, shape.is_elastic, shape.num_prefill))
    rows = [_HEAD, *(_row(search.tried[shape], "*" if shape in best else "") for shape in order)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)]
    confirmed = ", ".join(map(str, search.confirmed)) or "none"
    lines += ["", f"* the cheapest of its kind. Simulated step by step: {confirmed}; the others in leaps."]
    return "\n".join(lines)


def _row(outcomes: Outcomes, mark: str) -> tuple[str, ...]:
    return (
        f"{outcomes.shape}{mark or ' '}",
        f"{outcomes.shape.num_workers}",
        f"{100 * outcomes.good:.1f}",
        _ms(outcomes.ttft, 0),
        _ms(outcomes.tpot, 1),
        f"{outcomes.itl.p99 * 1e3:,.0f}",
        f"{outcomes.goodput:.3g}",
        f"{_percent(outcomes.prefill_utilisation)}/{_percent(outcomes.decode_utilisation)}",
    )


def _ms(percentiles: Percentiles, digits: int) -> str:
    return " / ".join(f"{seconds * 1e3:,.{digits}f}" for seconds in percentiles)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


def as_json(search: Search) -> dict[str, object]:
    """The same for programs; times in seconds, nothing measured: null."""
    return {
        "cheapest": None if search.cheapest is None else str(search.cheapest),
        "best": {kind: None if shape is None else str(shape) for kind, shape in search.best.items()},
        "tried": [
            {
                "fleet": str(shape),
                "prefill": shape.num_prefill,
                "decode": shape.num_decode,
                "step_by_step": shape in search.confirmed,
                "good": each.good,
                "goodput": each.goodput,
                "elastic": shape.is_elastic,
                "flips": each.num_flips,
                "redirects": each.num_redirects,
                "refused": each.num_refused,
                "ttft_s": _values(each.ttft),
                "tpot_s": _values(each.tpot),
                "itl_s": _values(each.itl),
                "cached": each.cached_share,
                "prefill_busy": _value(each.prefill_utilisation),
                "decode_busy": _value(each.decode_utilisation),
            }
            for shape, each in search.tried.items()
        ],
    }


def _values(percentiles: Percentiles) -> dict[str, float | None]:
    return {name: _value(seconds) for name, seconds in percentiles._asdict().items()}


def _value(number: float) -> float | None:
    return None if math.isnan(number) else number
