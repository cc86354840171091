"""Sets the objectives by what a lone request takes on this machine, where nobody has named any.

One load is a different one on another machine: objectives in milliseconds that mean something on a GPU are out of reach
for a laptop. DistServe (OSDI'24) scales its objectives by the latencies of an idle server for the same reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from loadtest.plan.records import RequestRecord

AUTO = "auto"
FACTOR = 5
"""Times what a lone request takes: a wait that people notice, and a pause of five tokens' time."""

# Rounded up to these, so that two sweeps on one machine have the same objectives.
_ROUND = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)


def objectives_from(lone: Sequence[RequestRecord]) -> str:
    """The objectives, as `--goodput` takes them, from requests that were alone. Raises ValueError where none was
    answered."""
    ttft_s = [each.ttft_s for each in lone if each.ok and each.ttft_s is not None]
    gaps_s = [statistics.median(each.gaps_s) for each in lone if each.ok and each.gaps_s]
    if not ttft_s:
        first_error = next((each.error for each in lone if not each.ok), "no request was sent")
        raise ValueError(f"--goodput {AUTO}: a lone request was not answered: {first_error}")
    limits = {"ttft": statistics.median(ttft_s)} | ({"itl": statistics.median(gaps_s)} if gaps_s else {})
    return ",".join(f"{name}:{_rounded(value_s * 1000 * FACTOR):g}" for name, value_s in limits.items())


def lone_ttft_s(lone: Sequence[RequestRecord]) -> float:
    """Median time to first token of requests that were alone."""
    return statistics.median(each.ttft_s for each in lone if each.ok and each.ttft_s is not None)


def _rounded(value: float) -> float:
    power = 1.0
    while value > 10 * power:
        power *= 10
    while value <= power:
        power /= 10
    return next(round(step * power, 9) for step in _ROUND if value <= step * power * 1.0001)
