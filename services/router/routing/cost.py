"""Estimates what a prompt costs at a worker. Pure: its cached prefix and the worker's load in.

The unit is the time that the prefill of one token takes: a term of 100 is as bad as 100 more tokens to compute. Times
are those of `services.rates`, as a model's workers learnt them; all count as equally fast: equal candidates stay equal.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import truediv
from typing import NamedTuple

from services.rates import GUESSED, TIERS, PerTier, Rates


@dataclass(frozen=True)
class CostModel:
    """The parameters. `rates` are of one model on this deployment, the rest is fixed."""

    rates: Rates = GUESSED
    load_tokens_per_s: PerTier = (math.inf, 200_000.0, 200_000.0, 20_000.0)
    """How fast a worker brings KV from a tier of its own into its paged cache."""
    new_work_weight: float = 2.0
    """A token to be computed, against one that is merely waited for: it also delays all who come later. At 1 a prompt
    would as soon be computed a second time elsewhere as wait for an equal one in front of it."""
    request_tokens: float = 32.0
    """Each request in front of a new one at a decode worker: it slows every step a little."""
    queued_request_tokens: float = 512.0
    """Each request beyond the worker's batch: a new one waits until so many have ended."""
    kv_use_tokens: float = 256.0
    """A full pool against an empty one, in steps of a tenth: preemption comes nearer, cached prefixes get evicted."""
    lateness_weight: float = 8.0
    """A token's time that a first token is expected beyond its objective: it goes before all that is only slower."""
    stall_weight: float = 8.0
    """A token's time that an answer's steps take beyond the worker's budget, over all of its tokens."""
    deflection_gain: float = 0.2
    """A prompt that is late either way is deflected where that takes so much less of the time to its first token."""
    bounded_load_factor: float = 1.25
    """prefix-hash: a worker may have so many times the mean load, plus the slack below."""
    bounded_load_slack_tokens: int = 4096
    """prefix-hash, prefill workers."""
    bounded_load_slack_requests: int = 4
    """prefix-hash, decode workers."""

    def tokens(self, seconds: float) -> float:
        """A time in the unit of costs."""
        return seconds / self.rates.prompt_token_s


class Held(NamedTuple):
    """The first blocks of a prompt at one holder. A tuple, since every request asks for some by their value."""

    num_blocks: int
    num_per_tier: tuple[int, int, int, int]
    """Adds up to num_blocks. Which of them lie in which tier is not known: the last ones are taken for the slowest."""

    def tail(self, num_skipped: int) -> tuple[int, int, int, int]:
        """The blocks per tier without the first `num_skipped`."""
        left = max(self.num_blocks - num_skipped, 0)
        counts = [0, 0, 0, 0]
        for tier in reversed(range(len(TIERS))):
            counts[tier] = min(self.num_per_tier[tier], left)
            left -= counts[tier]
        return counts[0], counts[1], counts[2], counts[3]

    @property
    def slowest_tier(self) -> str:
        return TIERS[max((tier for tier, count in enumerate(self.num_per_tier) if count), default=0)]


@dataclass(frozen=True)
class KnownPrefix:
    """Holds who has the first blocks of a prompt, under one model fingerprint."""

    block_size: int
    num_blocks: int = 0
    """Full blocks of the prompt."""
    held: Mapping[str, Held] = field(default_factory=dict)
    """What the index says, by holder; of the incarnations that the registry names."""
    expected: Mapping[str, int] = field(default_factory=dict)
    """Blocks that a worker must have, or have soon: this router sent it such a prompt a moment ago."""

    @cached_property
    def offers(self) -> Mapping[Held, str]:
        """What can be fetched, each from the first of those that have just that."""
        offers: dict[Held, str] = {}
        for holder_id, held in self.held.items():
            offers[held] = min(offers.get(held, holder_id), holder_id)
        return offers

    def own(self, worker_id: str) -> Held:
        """Counts the worker's own blocks; those expected of it come into its paged cache."""
        held = self.held.get(worker_id, NOTHING)
        num_soon = min(self.expected.get(worker_id, 0), self.num_blocks) - held.num_blocks
        if num_soon <= 0:
            return held
        device, host, store, disk = held.num_per_tier
        return Held(held.num_blocks + num_soon, (device + num_soon, host, store, disk))


NOTHING = Held(0, (0, 0, 0, 0))


@dataclass(frozen=True, slots=True)
class PrefillTerms:
    """The cost of a prompt at the worker that prefills it. All but the counts are in tokens."""

    worker_id: str
    queued: float
    """Prompt tokens in front of it."""
    num_own_blocks: int
    load: float
    """Bringing its own blocks from its slower tiers."""
    num_fetched_blocks: int
    fetched_from: str
    """Empty: no fetch pays."""
    fetch: float
    num_computed_tokens: int
    compute: float
    """What the prefill of num_computed_tokens takes, times new_work_weight."""
    beside: float = 0.0
    """What the worker's streams make of that. This and the next two: where elastic workers bend (bending.py)."""
    late: float = 0.0
    expected_s: float = 0.0
    """Seconds until the first token, without a handoff."""

    @property
    def work(self) -> float:
        """All but its lateness, which is also another worker's matter."""
        return self.queued + self.load + self.fetch + self.compute + self.beside

    @property
    def total(self) -> float:
        return self.work + self.late


class PrefillWork(NamedTuple):
    """What a prompt is to any worker with the same own blocks. Costs are in tokens."""

    num_own_blocks: int
    load: float
    num_fetched_blocks: int
    fetched_from: str
    fetch: float
    num_computed_tokens: int
    compute: float

    def at(self, worker_id: str, num_queued_tokens: int) -> PrefillTerms:
        """The terms of such a worker."""
        return PrefillTerms(worker_id, num_queued_tokens, *self)


@dataclass(frozen=True, slots=True)
class DecodeTerms:
    """The cost of a request at a decode worker. All but `worker_id` and `prefills` are in tokens."""

    worker_id: str
    prefills: bool
    """It computes the prompt's rest by itself."""
    prefill: float
    """The work of whoever prefills: this worker, or the best prefill worker."""
    handoff: float
    """Reading the blocks that it has not."""
    running: float
    queued: float
    kv_use: float
    kv_shortage: float
    """Blocks of the prompt that it has no room for."""
    late: float = 0.0
    """This and the next three: where elastic workers bend (bending.py)."""
    stall: float = 0.0
    occupied: float = 0.0
    expected_s: float = 0.0
    """Seconds until the first token, by way of whoever prefills."""

    @property
    def total(self) -> float:
        by_load = self.prefill + self.handoff + self.running + self.queued + self.kv_use + self.kv_shortage
        return by_load + self.late + self.stall + self.occupied


def prefill_work(cost: CostModel, own: Held, num_prompt_tokens: int, prefix: KnownPrefix) -> PrefillWork:
    """What a worker with these blocks does: after its own hit it fetches from the best holder, if that beats computing.

    That it may be a holder itself need not be looked at: nothing is left there that it has not.
    """
    rates = cost.rates
    load = cost.tokens(sum(map(truediv, own.num_per_tier, cost.load_tokens_per_s)) * prefix.block_size)

    def work(num_fetched: int, holder_id: str, fetch: float) -> PrefillWork:
        num_cached = (own.num_blocks + num_fetched) * prefix.block_size
        num_computed = max(num_prompt_tokens - num_cached, 1)
        compute = cost.tokens(rates.prompt_s(num_computed, num_prompt_tokens - num_computed)) * cost.new_work_weight
        return PrefillWork(own.num_blocks, load, num_fetched, holder_id, fetch, num_computed, compute)

    options = [work(0, "", 0.0)]
    for held, holder_id in prefix.offers.items():
        tail = _tokens(held.tail(own.num_blocks), prefix.block_size)
        if rates.fetching_pays(tail, own.num_blocks * prefix.block_size):
            options.append(work(held.num_blocks - own.num_blocks, holder_id, cost.tokens(rates.fetch_s(tail))))
    return min(options, key=lambda option: (option.fetch + option.compute, option.fetched_from))


def handoff_tokens(cost: CostModel, num_blocks: int, block_size: int) -> float:
    """Returns the cost of reading so many blocks from the prefill worker."""
    return cost.tokens(cost.rates.fetch_s(_tokens((num_blocks, 0, 0, 0), block_size)))


def _tokens(num_blocks: Sequence[int], block_size: int) -> list[int]:
    return [count * block_size for count in num_blocks]


def useful_sources(cost: CostModel, prefix: KnownPrefix, except_worker: str, count: int) -> tuple[str, ...]:
    """Holders of a prefix, best first for someone who has nothing. Whether to fetch, the worker decides."""
    if not prefix.held:
        return ()

    def gain(held: Held) -> float:
        num_tokens = _tokens(held.num_per_tier, prefix.block_size)
        return cost.rates.prompt_s(sum(num_tokens)) - cost.rates.fetch_s(num_tokens)

    gains = {held: gain(held) for held in prefix.offers}
    others = ((-gains[held], holder_id) for holder_id, held in prefix.held.items() if holder_id != except_worker)
    return tuple(holder_id for _, holder_id in heapq.nsmallest(count, others))
