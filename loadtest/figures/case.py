"""Takes the runs of one target at one rate together, and cuts them into stretches whose scatter is the noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loadtest.figures import noise
from loadtest.figures.result import RunResult
from loadtest.figures.summary import Summary, summarize
from loadtest.plan import RequestRecord

_NUM_STRETCHES = 8
# A stretch of fewer requests says more of the dice than of the target.
_MIN_REQUESTS = 5


@dataclass(frozen=True)
class Case:
    """One target at one rate. `stretches` are equal parts of its runs, in order; none where there are too few requests.

    Two targets' stretches at one rate have the same requests, where both have as many runs.
    """

    target: str
    rate: float
    runs: tuple[RunResult, ...]
    summary: Summary
    stretches: tuple[Summary, ...]

    @property
    def is_probe(self) -> bool:
        """Whether this run looked for a rate, and compares nothing."""
        return self.runs[0].turn == 0

    @property
    def measured(self) -> list[RequestRecord]:
        """The requests that count, of all runs."""
        return [record for run in self.runs for record in run.measured]

    @property
    def good(self) -> noise.Interval | None:
        """The share of good requests."""
        return noise.mean_of([each.good for each in self.stretches])


Figure = Callable[[Summary], float | None]
"""A figure of a run or of a stretch of it."""


def cases(results: Sequence[RunResult]) -> list[Case]:
    """Every target at every rate, in the order in which they first came.

    Where a rate was compared, the runs that looked for it are left out: they are shorter, and not all have them.
    """
    groups: dict[tuple[str, float], list[RunResult]] = {}
    for result in results:
        groups.setdefault((result.target, result.options.rate), []).append(result)
    made = []
    for (target, rate), group in groups.items():
        turns = {each.turn: each for each in group}
        runs = tuple(turns[turn] for turn in sorted(turns) if turn or len(turns) == 1)
        made.append(Case(target, rate, runs, summarize(_merged(runs)), _stretches(runs)))
    return made


def are_comparable(one: Case, other: Case) -> bool:
    """Whether both got the same requests, stretch by stretch."""
    return (
        one.rate == other.rate
        and [each.turn for each in one.runs] == [each.turn for each in other.runs]
        and len(one.stretches) == len(other.stretches) > 0
    )


def ratio(figure: Figure, one: Case, other: Case) -> noise.Interval | None:
    """A figure of `one` over that of `other`; None where they cannot be compared."""
    if not are_comparable(one, other):
        return None
    return noise.ratio([figure(each) for each in one.stretches], [figure(each) for each in other.stretches])


def lead(one: Case, other: Case, figure: Figure = lambda each: each.good) -> noise.Interval | None:
    """By how much a figure of `one` exceeds that of `other`, the share of good requests unless another one is given;
    None where they cannot be compared."""
    if not are_comparable(one, other):
        return None
    return noise.difference([figure(each) for each in one.stretches], [figure(each) for each in other.stretches])


def _merged(runs: Sequence[RunResult]) -> RunResult:
    """One result in which the runs follow each other: each begins to count where the last answer before it ended."""
    first = runs[0]
    if len(runs) == 1:
        return first
    records, num_before, end_s = [], 0, first.measured_from_s
    for run in runs:
        shift_s = end_s - run.measured_from_s
        records += [
            replace(
                each,
                index=each.index + num_before,
                scheduled_s=each.scheduled_s + shift_s,
                sent_s=each.sent_s + shift_s,
                finished_s=each.finished_s + shift_s,
                first_token_s=None if each.first_token_s is None else each.first_token_s + shift_s,
            )
            for each in run.records
        ]
        num_before += run.num_planned
        end_s = max((each.finished_s + shift_s for each in run.measured), default=end_s)
    return replace(
        first,
        num_planned=num_before,
        num_cut=max(each.num_cut for each in runs),
        measured_s=sum(each.measured_s for each in runs),
        records=tuple(records),
        notes=tuple(note for each in runs for note in each.notes),
    )


def _stretches(runs: Sequence[RunResult]) -> tuple[Summary, ...]:
    num_measured = [run.num_planned - run.options.warmup_requests for run in runs]
    for number in (_NUM_STRETCHES // len(runs), noise.MIN_BATCHES // len(runs)):
        if number and number * len(runs) >= noise.MIN_BATCHES and min(num_measured) >= number * _MIN_REQUESTS:
            return tuple(summarize(part) for run in runs for part in _parts(run, number))
    return ()


def _parts(run: RunResult, number: int) -> list[RunResult]:
    first, end = run.options.warmup_requests, run.num_planned
    mean_s = run.measured_s / (end - first)
    bounds = [first + (end - first) * place // number for place in range(number + 1)]
    return [
        replace(
            run,
            records=tuple(each for each in run.records if low <= each.index < high),
            num_planned=high - low,
            measured_from_s=run.measured_from_s + (low - first) * mean_s,
            measured_s=mean_s * (high - low),
        )
        for low, high in itertools.pairwise(bounds)
    ]
