"""Draws when requests are due: arrival processes, seeded, fixed before the run, independent of any answer.

All times are seconds from the start of the run, ascending, the first at one gap's distance from 0 (as Poisson has it).
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def gamma(rate: float, burstiness: float, num_requests: int, rng: random.Random) -> list[float]:
    """Gaps of mean 1/rate from a Gamma distribution whose shape is `burstiness`, as `vllm bench serve` has it.

    Shape 1 is a Poisson process; below 1 arrivals come in bursts, above 1 evenly. The coefficient of variation of the
    gaps is burstiness ** -0.5. Times are then stretched so that the last one is at num_requests / rate, as `vllm bench
    serve` does: a short run has its rate (a Poisson process given its number of arrivals).
    """
    _check_rate(rate)
    if burstiness <= 0:
        raise ValueError(f"burstiness must be positive, got {burstiness:g}")
    times, now = [], 0.0
    for _ in range(num_requests):
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    factor = num_requests / rate / now if now else 1.0
    return [time * factor for time in times]


def constant(rate: float, num_requests: int) -> list[float]:
    """One request every 1/rate seconds."""
    _check_rate(rate)
    return [(index + 1) / rate for index in range(num_requests)]


def stretched(times_s: Sequence[float], rate: float) -> list[float]:
    """The times of a trace, moved to start at 0 and stretched or compressed to `rate` requests per second on average.

    Bursts and lulls keep their proportions.
    """
    _check_rate(rate)
    if len(times_s) < 2:
        return [0.0] * len(times_s)
    first, last = times_s[0], times_s[-1]
    if last <= first:
        raise ValueError("a trace whose requests all come at one moment has no rate")
    factor = (len(times_s) - 1) / rate / (last - first)
    return [(time - first) * factor for time in times_s]


def spread_ties(times_s: Sequence[float], rng: random.Random) -> list[float]:
    """Times from a coarse clock, spread at random between equal stamps and the next one; the order stays.

    Mooncake's traces have stamps 3 s apart with a dozen requests on each: a burst that the service never saw.
    """
    spread: list[float] = []
    start = 0
    gap = 0.0
    while start < len(times_s):
        end = start
        while end < len(times_s) and times_s[end] == times_s[start]:
            end += 1
        # The last stamp has no next one: it takes the gap before it.
        gap = times_s[end] - times_s[start] if end < len(times_s) else gap
        ties = end - start
        offsets = sorted(rng.random() * gap for _ in range(ties)) if ties > 1 else [0.0]
        spread += [times_s[start] + offset for offset in offsets]
        start = end
    return spread


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise ValueError(f"the rate must be positive, got {rate:g} requests per second")
