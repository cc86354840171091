"""Aggregates a run second by second: its records and the server's gauges."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from loadtest.figures.scrape import Sample
from loadtest.plan import RequestRecord

Points = tuple[tuple[float, float], ...]


def tokens_per_second(records: Sequence[RequestRecord], bin_s: float) -> Points:
    """Returns output tokens per second in bins of this width; a chunk's tokens are taken as equal."""
    bins: dict[int, float] = defaultdict(float)
    for record in records:
        if record.first_token_s is None:
            continue
        per_chunk = record.num_output_tokens / (1 + len(record.gaps_s))
        at_s = record.first_token_s
        for gap_s in (0.0, *record.gaps_s):
            at_s += gap_s
            bins[math.floor(at_s / bin_s)] += per_chunk
    if not bins:
        return ()
    return tuple(((index + 0.5) * bin_s, bins[index] / bin_s) for index in range(max(bins) + 1))


def in_flight(records: Sequence[RequestRecord], step_s: float) -> Points:
    """Requests that are due and have no end yet, at regular moments."""
    if not records:
        return ()
    end_s = max(each.finished_s for each in records)
    moments = [index * step_s for index in range(int(end_s / step_s) + 2)]
    return tuple(
        (moment, float(sum(each.scheduled_s <= moment < each.finished_s for each in records))) for moment in moments
    )


def waiting(samples: Sequence[Sample], bin_s: float) -> Points:
    """Requests in the server's queues, all processes together."""
    sums: dict[int, dict[str, float]] = defaultdict(dict)
    for each in samples:
        if each.waiting is not None:
            sums[math.floor(each.at_s / bin_s)][each.process] = each.waiting
    return tuple(((index + 0.5) * bin_s, sum(queues.values())) for index, queues in sorted(sums.items()))


def kv_usage(samples: Sequence[Sample], role: str, bin_s: float) -> Points:
    """Share of KV blocks in use, of the fullest process whose name begins with `role`."""
    fullest: dict[int, float] = {}
    for each in samples:
        if each.kv_usage is not None and each.process.startswith(role):
            index = math.floor(each.at_s / bin_s)
            fullest[index] = max(fullest.get(index, 0.0), each.kv_usage)
    return tuple(((index + 0.5) * bin_s, share) for index, share in sorted(fullest.items()))
