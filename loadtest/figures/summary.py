"""Computes a run's figures from its records alone: percentiles, rates, goodput, also per class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from loadtest.figures.result import RunResult
from loadtest.plan import Outcome, RequestRecord, Slo, num_good, percentile

HEALTHY = 0.9
"""The share of good requests from which on a target keeps up."""


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of a latency in seconds; all None where nothing was measured."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        known = sorted(value for value in values if value is not None)
        if not known:
            return cls(None, None, None, None, None)
        return cls(sum(known) / len(known), *(percentile(known, share) for share in (0.5, 0.9, 0.95, 0.99)))


@dataclass(frozen=True)
class ClassSummary:
    """The requests of one class; `good` is the share that met the objectives."""

    kind: str
    num_requests: int
    num_errors: int
    num_refusals: int
    good: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    request_itl: Spread
    e2e: Spread


@dataclass(frozen=True)
class Summary:
    """One run. Rates are per second.

    `offered_rate`, `goodput` and `good` count requests due in the window, whenever they end. `request_rate` and token
    rates count from the first request due to the last token, as `vllm bench serve` does. `itl` is of all gaps together,
    `request_itl` of each request's 99th percentile: the objective `itl` is about the latter.
    """

    target: str
    rate: float
    offered_rate: float
    num_requests: int
    num_ok: int
    num_errors: int
    num_refusals: int
    num_lost: int
    num_late: int
    latest_send_s: float
    good: float
    goodput: float
    duration_s: float
    request_rate: float
    output_token_rate: float
    total_token_rate: float
    prompt_tokens: float
    output_tokens: float
    cached_share: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    request_itl: Spread
    e2e: Spread
    classes: tuple[ClassSummary, ...]
    first_error: str

    @property
    def is_healthy(self) -> bool:
        """Whether 90 % of the requests were good: below that, nothing here is called the best."""
        return self.good >= HEALTHY and self.num_requests > 0

    @property
    def late_share(self) -> float:
        return self.num_late / max(1, self.num_requests)

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def summarize(result: RunResult) -> Summary:
    """All figures of a run; warm-up requests are left out."""
    records, slo = result.measured, result.options.slo
    done = [each for each in records if each.ok]
    num_expected = result.num_planned - sum(each.is_warmup for each in result.records)
    duration_s = max((each.finished_s for each in records), default=0.0) - result.measured_from_s
    over = 1 / duration_s if duration_s > 0 else 0.0
    num_prompt_tokens = sum(each.num_prompt_tokens for each in done)
    num_output_tokens = sum(each.num_output_tokens for each in done)
    good = num_good(records, slo)
    return Summary(
        target=result.target,
        rate=result.options.rate,
        offered_rate=num_expected / result.measured_s,
        num_requests=len(records),
        num_ok=len(done),
        num_errors=_count(records, Outcome.ERROR),
        num_refusals=_count(records, Outcome.REFUSED),
        num_lost=result.num_lost,
        num_late=sum(each.late_s * 1000 > result.options.late_ms for each in records),
        latest_send_s=max((each.late_s for each in records), default=0.0),
        good=good / max(1, num_expected),
        goodput=good / result.measured_s,
        duration_s=duration_s,
        request_rate=len(done) * over,
        output_token_rate=num_output_tokens * over,
        total_token_rate=(num_prompt_tokens + num_output_tokens) * over,
        prompt_tokens=num_prompt_tokens / max(1, len(done)),
        output_tokens=num_output_tokens / max(1, len(done)),
        cached_share=sum(each.num_cached_tokens for each in done) / max(1, num_prompt_tokens),
        **_latencies(done),
        classes=tuple(_class_summary(kind, records, slo) for kind in _kinds(records)),
        first_error=next((each.error for each in records if not each.ok), ""),
    )


def as_ms(seconds: float | None) -> float | None:
    """Milliseconds, where there is a figure."""
    return None if seconds is None else seconds * 1000


def shown(value: float | None, form: str = ",.0f") -> str:
    """A figure as people read it; a dash where there is none."""
    return "–" if value is None else format(value, form)


def _kinds(records: Sequence[RequestRecord]) -> list[str]:
    """The classes, those with the shortest prompts first."""
    lengths: dict[str, list[int]] = {}
    for each in records:
        lengths.setdefault(each.kind, []).append(each.num_prompt_tokens)
    return sorted(lengths, key=lambda kind: sum(lengths[kind]) / len(lengths[kind]))


def _class_summary(kind: str, records: Sequence[RequestRecord], slo: Slo) -> ClassSummary:
    mine = [each for each in records if each.kind == kind]
    return ClassSummary(
        kind=kind,
        num_requests=len(mine),
        num_errors=_count(mine, Outcome.ERROR),
        num_refusals=_count(mine, Outcome.REFUSED),
        good=num_good(mine, slo) / len(mine),
        **_latencies([each for each in mine if each.ok]),
    )


def _latencies(done: Sequence[RequestRecord]) -> dict[str, Spread]:
    return {
        "ttft": Spread.of(each.ttft_s for each in done),
        "tpot": Spread.of(each.tpot_s for each in done),
        "itl": Spread.of(gap for each in done for gap in each.gaps_s),
        "request_itl": Spread.of(each.itl_s for each in done),
        "e2e": Spread.of(each.e2e_s for each in done),
    }


def _count(records: Iterable[RequestRecord], outcome: Outcome) -> int:
    return sum(each.outcome is outcome for each in records)
