"""Lists what casts doubt on a figure, and how much: late sends, a busy machine, errors, lost records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from loadtest.figures.case import Case

# Shares of the requests that left late.
_LATE_DOUBTFUL, _LATE_VOID = 0.01, 0.10
# Shares of the machine's processors that others used.
_BUSY_DOUBTFUL, _BUSY_VOID = 0.05, 0.25


class Weight(IntEnum):
    """What a doubt does to a verdict that rests on this figure."""

    NOTE = 0
    DOUBTFUL = 1
    """The verdict stands, with this reason beside it."""
    VOID = 2
    """There is no verdict."""


@dataclass(frozen=True)
class Doubt:
    """One reason to doubt one target's figures at one rate. `short` names the kind, `text` has the numbers."""

    target: str
    rate: float
    weight: Weight
    short: str
    text: str


def doubts_of(case: Case) -> list[Doubt]:
    """Everything that casts doubt on it, the worst first."""
    summary = case.summary
    found: list[tuple[Weight, str, str]] = []
    if summary.num_late:
        found.append(
            (
                _weight(summary.late_share, _LATE_DOUBTFUL, _LATE_VOID),
                "sent late",
                f"{summary.num_late} of {summary.num_requests} requests, by at most "
                f"{summary.latest_send_s * 1000:.0f} ms: the load generator was short of CPU",
            )
        )
    shares = [run.machine_use.others_share for run in case.runs if run.machine_use]
    if shares and max(shares) >= _BUSY_DOUBTFUL:
        found.append(
            (
                _weight(max(shares), _BUSY_DOUBTFUL, _BUSY_VOID),
                "machine busy",
                f"others used {max(shares):.0%} of the processors",
            )
        )
    if summary.num_lost:
        found.append((Weight.DOUBTFUL, "cut short", f"{summary.num_lost} requests have no record"))
    if summary.num_errors:
        found.append((Weight.NOTE, "errors", f"{summary.num_errors}, the first: {summary.first_error}"))
    found += [(Weight.NOTE, "note", note) for run in case.runs for note in run.notes]
    found.sort(key=lambda each: -each[0])
    return [Doubt(case.target, case.rate, *each) for each in found]


def worst(doubts: Iterable[Doubt]) -> Weight:
    """The heaviest of them."""
    return max((each.weight for each in doubts), default=Weight.NOTE)


def told(doubts: Sequence[Doubt], weight: Weight) -> str:
    """Those of at least this weight, in one clause each, without repeating a kind."""
    kinds: dict[str, list[Doubt]] = {}
    for each in doubts:
        if each.weight >= weight:
            kinds.setdefault(each.short, []).append(each)
    return "; ".join(
        f"{short} ({', '.join(f'{each.target} at {each.rate:g}/s: {each.text}' for each in group)})"
        for short, group in kinds.items()
    )


def _weight(share: float, doubtful: float, void: float) -> Weight:
    if share >= void:
        return Weight.VOID
    return Weight.DOUBTFUL if share >= doubtful else Weight.NOTE
