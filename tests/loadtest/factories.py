"""Records and results with sensible values, for tests that care about a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loadtest.figures import RunResult
from loadtest.figures.scrape import Sample
from loadtest.plan import LoadOptions, Outcome, RequestRecord

RECORD = RequestRecord(
    index=0,
    kind="short",
    turn=0,
    is_warmup=False,
    scheduled_s=1.0,
    sent_s=1.001,
    finished_s=2.0,
    outcome=Outcome.OK,
    first_token_s=1.5,
    gaps_s=(0.1, 0.4),
    num_prompt_tokens=100,
    num_cached_tokens=32,
    num_output_tokens=3,
)


def records(number: int, rate: float, ttft_s: float, gap_s: float = 0.05) -> list[RequestRecord]:
    """A second of warm-up, then `number` requests at regular intervals, all with these latencies."""
    made = []
    for index in range(number):
        due_s = (index + 1) / rate
        made.append(
            replace(
                RECORD,
                index=index,
                kind="short" if index % 2 else "long",
                scheduled_s=due_s,
                sent_s=due_s,
                first_token_s=due_s + ttft_s,
                gaps_s=(gap_s,) * 4,
                finished_s=due_s + ttft_s + 4 * gap_s,
                num_output_tokens=5,
            )
        )
    return made


def some_good(number: int, rate: float, good: float) -> list[RequestRecord]:
    """Requests of which this share, evenly spread, has a time to first token of 0.2 s, the others one of 3 s."""
    return [
        each
        if int((each.index + 1) * good + 1e-9) > int(each.index * good + 1e-9)
        else replace(each, first_token_s=each.scheduled_s + 3, finished_s=each.scheduled_s + 3.2)
        for each in records(number, rate, ttft_s=0.2)
    ]


def result(target: str, rate: float, made: Sequence[RequestRecord], goodput: str = "ttft:1000,tpot:100") -> RunResult:
    """A run of these records; none of them counts as warm-up unless it says so."""
    measured = [each.scheduled_s for each in made if not each.is_warmup]
    return RunResult(
        target=target,
        url="http://127.0.0.1:1",
        model="stub",
        workload="made for a test",
        started_unix_s=0.0,
        options=LoadOptions(rate=rate, goodput=goodput, warmup_requests=len(made) - len(measured)),
        num_planned=len(made),
        num_cut=0,
        measured_from_s=measured[0],
        measured_s=len(measured) / rate,
        records=tuple(made),
        samples=tuple(
            Sample(float(second), process, 1.0, 2.0, 0.5)
            for second in range(3)
            for process in ("decode-0", "prefill-0")
        ),
    )
