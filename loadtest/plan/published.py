"""Draws workloads without a trace file, from parameters fitted to published traces.

Only these parameters are here; the traces themselves are published by their owners:

- `azure`: AzureLLMInferenceTrace_conv.csv (github.com/Azure/AzurePublicDataset, CC-BY 4.0), 19,366 requests in 3,502 s
  on 2023-11-16, 5.53 per second. Lengths of prompts and answers are hardly correlated (0.09 between their logarithms),
  so both are drawn from their own percentiles. The gaps between its requests have a coefficient of variation of 1.09:
  near Poisson within a minute. Over minutes the rate wanders from 3.2 to 8.5 per second, which is left out here.
- `mooncake`: conversation_trace.jsonl (github.com/kvcache-ai/Mooncake, FAST25-release, Apache-2.0), 12,031 requests in
  3,537 s, 3.40 per second. All prompts begin with the same block of 512 tokens. 33 % of the requests continue an
  earlier prompt; after turn k another follows with the probability in `_CONTINUES` (from the depth counts 8056, 2032,
  799, 397, 218, 132, 86, ..., raised by a tenth, since turns due after the hour are missing), after a think time whose
  logarithm is normal: median 126 s, 90th percentile 480 s. A turn adds to the prompt before it that prompt's answer
  and the percentiles in `_ADDED`. With an unbounded cache 36.6 % of the trace's prompt blocks are prefix hits; of the
  generator's 36 to 38 %.

A percentile table is the distribution: a uniform number picks a place in it, and lengths between two entries are
interpolated in the logarithm.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.plan.traces import BLOCK_TOKENS, TraceRequest, fresh_blocks

_PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True)
class Percentiles:
    """A distribution of lengths, given by its values at _PERCENTS."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.values) == len(_PERCENTS)
        assert list(self.values) == sorted(self.values)
        assert self.values[0] > 0

    def at(self, share: float) -> int:
        """The length that the share (0 to 1) of all requests does not exceed."""
        place = min(len(_PERCENTS) - 2, bisect_right(_PERCENTS, share * 100) - 1)
        low, high = self.values[place], self.values[place + 1]
        inside = (share * 100 - _PERCENTS[place]) / (_PERCENTS[place + 1] - _PERCENTS[place])
        return round(low * math.exp(inside * math.log(high / low)))

    def draw(self, rng: random.Random) -> int:
        return self.at(rng.random())


_AZURE_INPUT = Percentiles((2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 6179, 14050))
_AZURE_OUTPUT = Percentiles((7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 954, 1000))

_MOONCAKE_FIRST_INPUT = Percentiles((891, 894, 898, 907, 1459, 5933, 14283, 26280, 38154, 87220, 120636, 126195))
_MOONCAKE_OUTPUT = Percentiles((1, 3, 10, 24, 156, 350, 472, 597, 698, 1118, 2000, 2000))
# What a turn adds beyond the answer before it; the trace's lowest tenth is below zero (answers that were shortened).
_ADDED = Percentiles((1, 1, 1, 2, 9, 26, 384, 4363, 7238, 16805, 38891, 91467))
_CONTINUES = (0.28, 0.43, 0.55, 0.60, 0.66, 0.72, 0.80, 0.82)
_MAX_INPUT = 126_195
_MOONCAKE_RATE = 3.40
_THINK_MEDIAN_S, _THINK_SIGMA = 126.0, math.log(480 / 126) / 1.2816
_SYSTEM_BLOCK = 0


def azure_like(times_s: Sequence[float], rng: random.Random) -> list[TraceRequest]:
    """Requests at these times with the lengths of Azure's conversation trace; they share nothing."""
    fresh = itertools.count(1)
    requests = []
    for at_s in times_s:
        input_length = _AZURE_INPUT.draw(rng)
        blocks = fresh_blocks(input_length, fresh)
        requests.append(TraceRequest(at_s, input_length, _AZURE_OUTPUT.draw(rng), blocks))
    return requests


@dataclass(frozen=True)
class Conversations:
    """The course of conversations: their beginning, their turns, and the pauses between.

    After turn k another follows with probability `continues[k]` (the last entry for all later turns). Think times are
    log-normal, in seconds at `rate` requests per second; at another rate they are stretched, so that as many requests
    of others come between two turns.
    """

    first_input: Percentiles
    added: Percentiles
    output: Percentiles
    continues: tuple[float, ...]
    think_median_s: float
    think_sigma: float
    rate: float
    max_input: int
    shares_first_block: bool

    def requests(self, times_s: Sequence[float], rng: random.Random) -> list[TraceRequest]:
        """A request at each of the times: the conversation that has been due longest goes on, or a new one begins.

        So the arrival process is exactly the one asked for, and turns depend on the clock alone, never on answers. A
        turn's prompt is all that came before it, the (synthetic) answers included, and what it adds.
        """
        fresh = itertools.count(1)
        due: list[tuple[float, int, TraceRequest]] = []
        span = (times_s[-1] - times_s[0]) if len(times_s) > 1 else 0.0
        stretch = self.rate * span / max(1, len(times_s) - 1)
        requests = []
        for index, at_s in enumerate(times_s):
            if due and due[0][0] <= at_s:
                before = heapq.heappop(due)[2]
                request = self._next_turn(before, at_s, fresh, rng)
            else:
                length = self.first_input.draw(rng)
                blocks = fresh_blocks(length, fresh)
                blocks = (_SYSTEM_BLOCK, *blocks[1:]) if self.shares_first_block else blocks
                request = TraceRequest(at_s, length, self.output.draw(rng), blocks)
            requests.append(request)
            goes_on = rng.random() < self.continues[min(request.turn, len(self.continues) - 1)]
            if goes_on and request.input_length < self.max_input:
                think_s = rng.lognormvariate(math.log(self.think_median_s), self.think_sigma) * stretch
                heapq.heappush(due, (at_s + think_s, index, request))
        return requests

    def _next_turn(
        self, before: TraceRequest, at_s: float, fresh: itertools.count[int], rng: random.Random
    ) -> TraceRequest:
        length = min(self.max_input, before.input_length + before.output_length + self.added.draw(rng))
        # The block that was partly filled gets new content, so it is another block.
        kept = before.block_ids[: before.input_length // BLOCK_TOKENS]
        num_new = -(-length // BLOCK_TOKENS) - len(kept)
        blocks = (*kept, *itertools.islice(fresh, num_new))
        return TraceRequest(at_s, length, self.output.draw(rng), blocks, before.turn + 1)


MOONCAKE = Conversations(
    first_input=_MOONCAKE_FIRST_INPUT,
    added=_ADDED,
    output=_MOONCAKE_OUTPUT,
    continues=_CONTINUES,
    think_median_s=_THINK_MEDIAN_S,
    think_sigma=_THINK_SIGMA,
    rate=_MOONCAKE_RATE,
    max_input=_MAX_INPUT,
    shares_first_block=True,
)
