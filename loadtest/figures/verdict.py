"""Says which target is better, and by how much.

Better is the higher goodput at its best rate. Differences of less than 5 % are called none: two runs of one server
differ as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.figures.summary import Summary

_NO_DIFFERENCE = 1.05
_HEALTHY = 0.9


@dataclass(frozen=True)
class Standing:
    """One target's results over all rates. `healthy_rate`: the highest rate with 90 % of requests good."""

    target: str
    best_goodput: float
    at_rate: float
    healthy_rate: float | None


@dataclass(frozen=True)
class Verdict:
    """`ratio` is the best target's goodput over the second's; None where there is nothing to compare, or no other
    target had any good request. `winner` is None where the two differ by less than 5 %."""

    standings: tuple[Standing, ...]
    winner: str | None
    ratio: float | None
    sentence: str


def judge(summaries: Sequence[Summary]) -> Verdict:
    """Compares the targets over all their rates."""
    targets = list(dict.fromkeys(each.target for each in summaries))
    standings = sorted(
        (_standing([each for each in summaries if each.target == target]) for target in targets),
        key=lambda standing: -standing.best_goodput,
    )
    best = standings[0]
    if len(standings) == 1:
        sentence = f"{best.target} reached a goodput of {best.best_goodput:.2f} requests/s, offered {best.at_rate:g}/s."
        return Verdict(tuple(standings), best.target, None, sentence)
    second = standings[1]
    figures = f"{best.best_goodput:.2f} against {second.best_goodput:.2f} requests/s within the objectives"
    if best.best_goodput == 0:
        return Verdict(tuple(standings), None, None, "No target answered any request within the objectives.")
    if second.best_goodput == 0:
        sentence = f"{best.target} is better: {best.best_goodput:.2f} requests/s were good, of {second.target} none."
        return Verdict(tuple(standings), best.target, None, sentence)
    ratio = best.best_goodput / second.best_goodput
    latencies = _latencies(summaries)
    if ratio >= _NO_DIFFERENCE:
        sentence = f"{best.target} is better than {second.target} by a factor of {ratio:.2f}: {figures}.{latencies}"
        return Verdict(tuple(standings), best.target, ratio, sentence)
    sentence = f"{best.target} and {second.target} do not differ clearly in goodput: {figures}."
    if all(each.good >= _HEALTHY for each in summaries):
        sentence += " Neither was overloaded at any rate: higher rates would tell more."
    return Verdict(tuple(standings), None, ratio, sentence + latencies)


def _latencies(summaries: Sequence[Summary]) -> str:
    """Compares latencies at the highest rate at which every target is healthy; a blank line comes first, if any."""
    rates = sorted({each.rate for each in summaries}, reverse=True)
    for rate in rates:
        group = [each for each in summaries if each.rate == rate]
        if all(each.good >= _HEALTHY for each in group):
            found = [
                compare("time to first token (p90)", {each.target: each.ttft.p90 for each in group}),
                compare("gap between chunks (p99)", {each.target: each.itl.p99 for each in group}),
            ]
            told = "; ".join(filter(None, found))
            return f" At {rate:g}/s, where all do well: {told}." if told else ""
    return ""


def compare(name: str, values_s: dict[str, float | None]) -> str:
    """Say `NAME 179 ms on colocated, 307 ms on disaggregated (1.72 times)`; "" where the best two hardly differ."""
    known = sorted((value, target) for target, value in values_s.items() if value)
    if len(known) < 2 or known[1][0] < known[0][0] * _NO_DIFFERENCE:
        return ""
    (best_s, best), (next_s, other) = known[:2]
    return f"{name} {_time(best_s)} on {best}, {_time(next_s)} on {other} ({next_s / best_s:.2f} times)"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1000:,.0f} ms"


def _standing(mine: Sequence[Summary]) -> Standing:
    best = max(mine, key=lambda each: each.goodput)
    healthy = [each.rate for each in mine if each.good >= _HEALTHY]
    return Standing(best.target, best.goodput, best.rate, max(healthy, default=None))
