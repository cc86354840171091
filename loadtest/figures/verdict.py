"""Says which target is better and by how much, or why that cannot be said.

Better is who keeps 90 % of its requests good up to a higher rate. There is a winner only where, at a rate at which both
got the same requests, the difference in good requests exceeds the noise; and no verdict where the machine had other
things to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loadtest.figures.case import Case, Figure, are_comparable, lead, ratio
from loadtest.figures.doubts import Weight, doubts_of, told, worst
from loadtest.figures.summary import HEALTHY

_NO_DIFFERENCE = 1.05
_KEEPS = f"{HEALTHY:.0%} of its requests good".replace("%", " %")


class Level(StrEnum):
    """How far a verdict can be trusted. `TIE`: no difference found. `NONE`: there is none; the sentence says why."""

    CLEAR = "clear"
    DOUBTFUL = "doubtful"
    TIE = "tie"
    NONE = "none"


@dataclass(frozen=True)
class Standing:
    """One target's results over all rates. `healthy_rate`: the highest rate up to which 90 % were good at every rate
    tried, None where there is none; `goodput` is what it reached there. `next_rate`: the lowest that was too much."""

    target: str
    healthy_rate: float | None
    goodput: float | None
    next_rate: float | None


@dataclass(frozen=True)
class Verdict:
    """`winner` is None where nobody is known to be better. `factor`: how many times the second's rate the winner
    keeps up with, None where the second does with none; it lies between `factor_low` and `factor_high`, as far as the
    rates that were tried can tell."""

    level: Level
    standings: tuple[Standing, ...]
    winner: str | None
    factor: float | None
    factor_low: float | None
    factor_high: float | None
    sentence: str
    reservation: str
    """What the reader must know beside the sentence; empty where there is nothing."""


def judge(cases: Sequence[Case]) -> Verdict:
    """Compares the targets over all their rates."""
    targets = list(dict.fromkeys(each.target for each in cases))
    standings = sorted(
        (_standing([each for each in cases if each.target == target]) for target in targets),
        key=lambda standing: -(standing.healthy_rate or 0.0),
    )
    best, *others = standings
    if best.healthy_rate is None:
        return _weighed(standings, [_nearest(cases)], Level.NONE, _nobody(cases))
    if not others:
        sentence = f"{best.target} kept {_KEEPS} up to {best.healthy_rate:g} requests/s{_until(best)}."
        return _weighed(standings, _at(cases, best, best.healthy_rate), Level.CLEAR, sentence)
    second = others[0]
    pair = _compared(cases, best, second)
    reached = [
        case for each in (best, second) for rate in (best, second) for case in _at(cases, each, rate.healthy_rate)
    ]
    deciding = list({id(case): case for case in (*reached, *pair)}.values())
    if best.healthy_rate == second.healthy_rate:
        sentence = f"No difference found: {best.target} and {second.target} both kept {_KEEPS} up to "
        sentence += f"{best.healthy_rate:g} requests/s."
        if best.next_rate is None and second.next_rate is None:
            sentence += " Neither was overloaded at any rate: higher rates would tell more."
        return _weighed(standings, deciding, Level.TIE, sentence + _latencies(cases, standings))
    if why := _noise(pair, best, second):
        return _weighed(standings, deciding, Level.NONE, why)
    sentence = f"{best.target} is better: it kept {_KEEPS} up to {best.healthy_rate:g} requests/s{_until(best)}, "
    sentence += f"{second.target} {_up_to(second)}{_factor_text(best, second)}."
    return _weighed(standings, deciding, Level.CLEAR, sentence + _latencies(cases, standings), best.target)


def compare(name: str, figure: Figure, cases: Sequence[Case]) -> str:
    """Say `NAME 179 ms on colocated, 307 ms on disaggregated (1.72 times, …)` of the runs at one rate; "" where the
    best two differ by less than 5 % or than the noise."""
    known = sorted(
        ((value, case.target, case) for case in cases if (value := figure(case.summary))), key=lambda e: e[:2]
    )
    if len(known) < 2:
        return ""
    (best_s, best, one), (next_s, other, two) = known[:2]
    times = ratio(figure, two, one)
    if times is None or times.has(1.0) or next_s < best_s * _NO_DIFFERENCE:
        return ""
    return (
        f"{name} {_time(best_s)} on {best}, {_time(next_s)} on {other} "
        f"({next_s / best_s:.2f} times; by stretches {times.low:.2f} to {times.high:.2f})"
    )


def is_clearly_better(figure: Figure, one: Case, other: Case, lower_is_better: bool) -> bool:
    """Whether `one` is better in this figure by 5 % and by more than the noise."""
    if lower_is_better:
        times = ratio(figure, other, one)
        return times is not None and times.mean >= _NO_DIFFERENCE and times.low > 1.0
    more = lead(one, other, figure)  # no ratio: the other one's may be 0
    mine, others = figure(one.summary), figure(other.summary)
    return more is not None and more.low > 0 and (mine or 0.0) >= (others or 0.0) * _NO_DIFFERENCE


def _standing(mine: Sequence[Case]) -> Standing:
    too_much = min((each.rate for each in mine if not each.summary.is_healthy), default=None)
    healthy = [each for each in mine if each.summary.is_healthy and (too_much is None or each.rate < too_much)]
    if not healthy:
        return Standing(mine[0].target, None, None, too_much)
    last = max(healthy, key=lambda each: each.rate)
    return Standing(last.target, last.rate, last.summary.goodput, too_much)


def _nobody(cases: Sequence[Case]) -> str:
    nearest = _nearest(cases)
    if not any(each.summary.num_ok for each in cases):
        return "No verdict: no target answered any request."
    return (
        f"No verdict: nobody kept {_KEEPS} at any rate. The nearest was {nearest.target} at {nearest.rate:g}/s, with "
        f"{_percent(nearest.summary.good)}. Lower rates or easier objectives would tell more."
    )


def _nearest(cases: Sequence[Case]) -> Case:
    return max(cases, key=lambda each: each.summary.good)


def _compared(cases: Sequence[Case], best: Standing, second: Standing) -> tuple[Case, ...]:
    """The two cases that decide: at the highest rate that the best keeps up with and the second does not, and at which
    both got the same requests. One rate, and not the best of several: some rate shows a difference by chance."""
    pairs = [
        (one, other)
        for one in cases
        for other in cases
        if (one.target, other.target) == (best.target, second.target)
        and one.rate > (second.healthy_rate or 0.0)
        and are_comparable(one, other)
    ]
    pairs.sort(key=lambda pair: pair[0].rate)
    return next(iter([pair for pair in pairs if pair[0].rate <= (best.healthy_rate or 0.0)][-1:] or pairs[:1]), ())


def _noise(pair: Sequence[Case], best: Standing, second: Standing) -> str:
    """Why the best is not known to be better than the second; "" where it is."""
    start = f"No verdict: {best.target} kept {_KEEPS} up to {best.healthy_rate:g} requests/s, {second.target} "
    start += f"{_up_to(second)}, but "
    if not pair:
        return f"{start}no rate between these was compared with enough requests (at least 20) to tell that from noise."
    one, other = pair
    found = lead(one, other)
    assert found is not None  # they are comparable
    if found.low > 0:
        return ""
    shares = f"at {one.rate:g}/s {_percent(one.summary.good)} against {_percent(other.summary.good)} were good"
    if found.mean < 0:
        return f"{start}where both had enough requests it is the other way round: {shares}. More rates would tell more."
    low, high = max(-100, found.low * 100), min(100, found.high * 100)
    return (
        f"{start}that is within the noise: {shares}, a difference between {low:.0f} and {high:.0f} percentage points. "
        "Longer runs would tell more."
    )


def _up_to(standing: Standing) -> str:
    if standing.healthy_rate is None:
        return f"at no rate (not at {standing.next_rate:g})"
    return f"up to {standing.healthy_rate:g}{_until(standing)}"


def _until(standing: Standing) -> str:
    return f" (not at {standing.next_rate:g})" if standing.next_rate is not None else " (the highest tried)"


def _factor(best: Standing, second: Standing) -> tuple[float | None, float | None, float | None]:
    assert best.healthy_rate is not None
    low = best.healthy_rate / second.next_rate if second.next_rate else None
    if second.healthy_rate is None:
        return None, low, None
    high = best.next_rate / second.healthy_rate if best.next_rate else None
    return best.healthy_rate / second.healthy_rate, low, high


def _factor_text(best: Standing, second: Standing) -> str:
    factor, low, high = _factor(best, second)
    if factor is None:
        return ""
    if low is None or high is None:
        return f": {factor:.1f} times"
    return f": {factor:.1f} times, by the rates tried between {low:.1f} and {high:.1f}"


def _latencies(cases: Sequence[Case], standings: Sequence[Standing]) -> str:
    """Compares latencies at the highest rate that every target keeps up with; a blank comes first, if any."""
    reached = [each.healthy_rate for each in standings]
    for rate in sorted({each.rate for each in cases}, reverse=True):
        group = [each for each in cases if each.rate == rate]
        if len(group) == len(standings) and all(known is not None and known >= rate for known in reached):
            found = [
                compare("time to first token (p90)", lambda each: each.ttft.p90, group),
                compare("a request's 99th percentile of gaps (p90)", lambda each: each.request_itl.p90, group),
            ]
            if said := "; ".join(filter(None, found)):
                return f" At {rate:g}/s, where all keep up: {said}."
    return ""


def _weighed(
    standings: Sequence[Standing], deciding: Sequence[Case], level: Level, sentence: str, winner: str | None = None
) -> Verdict:
    """The verdict that the sentence gives, as far as the doubts about the deciding cases let it stand."""
    doubts = [doubt for case in deciding for doubt in doubts_of(case)]
    weight = worst(doubts)
    if weight is Weight.VOID:
        return Verdict(
            Level.NONE, tuple(standings), None, None, None, None,
            f"No verdict: {told(doubts, Weight.VOID)}. Measure again on a quiet machine.", "",
        )  # fmt: skip
    if level is Level.CLEAR and weight is Weight.DOUBTFUL:
        level = Level.DOUBTFUL
    factors = _factor(standings[0], standings[1]) if winner else (None, None, None)
    return Verdict(level, tuple(standings), winner, *factors, sentence, told(doubts, Weight.DOUBTFUL))


def _at(cases: Sequence[Case], standing: Standing, rate: float | None) -> list[Case]:
    return [each for each in cases if (each.target, each.rate) == (standing.target, rate)]


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1000:,.0f} ms"
