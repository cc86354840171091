"""Learns how fast a worker is: one formula for the time of a step and of a fetch, one learner.

    step    base + prompt tokens + prompt tokens x tokens before each + generating sequences + tokens of their contexts
    fetch   latency + tokens, by the tier that they come from

Both are linear with coefficients that are never negative. A worker learns them from every step and fetch of its own
(`RateLearner`), and tells them (`Rates`) in its load; the router and the worker decide by the same methods of `Rates`.
Nobody else learns. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter, mul
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TIERS = ("device", "host", "store", "disk")
"""Fastest first. The words are those of worker.proto."""

PerTier = tuple[float, float, float, float]


class StepShape(NamedTuple):
    """The work of a step. A sequence with one token computed counts as generating, a longer run as prompt; a guess that
    is computed with such a token counts as one more sequence.
    """

    num_prompt_tokens: int = 0
    num_prompt_pairs: int = 0
    """Over the prompts' tokens: each with every token that it attends to, itself included."""
    num_running: int = 0
    """Sequences that generate."""
    num_context_tokens: int = 0
    """Over these: tokens that the new one attends to, itself included."""


NO_STEP = StepShape()


def num_pairs(start: int, num_tokens: int) -> int:
    """(token, token that it attends to) in a run of a prompt that begins at position `start`."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


def tokens_of(tier: str, num_tokens: int) -> tuple[int, int, int, int]:
    """Return the tokens per tier where all come from one."""
    device, host, store, disk = (num_tokens * (each == tier) for each in TIERS)
    return device, host, store, disk


@dataclass(frozen=True)
class Rates:
    """A worker's coefficients, in seconds each. The defaults are what is assumed of one that has learnt nothing.

    Only their proportions matter much: with the first step everything is scaled by how far off the guess was, and what
    a worker has never done, or not lately, stays in proportion to what it does.
    """

    base_s: float = 0.01
    prompt_token_s: float = 2e-4
    prompt_pair_s: float = 2e-8
    running_s: float = 2e-4
    context_token_s: float = 2e-7
    spread: float = 1.0
    """By how much a step misses the formula: mean of |measured - expected| over the larger of the two, 0 to 1."""
    num_steps: float = 0.0
    """That the coefficients rest on, old ones faded; 0: the guess."""
    fetch_latency_s: float = 0.005
    fetch_device_s: float = 1 / 50_000
    """A token from a holder's paged cache; the next three from its slower tiers."""
    fetch_host_s: float = 1 / 50_000
    fetch_store_s: float = 1 / 30_000
    fetch_disk_s: float = 1 / 10_000
    num_fetches: float = 0.0

    def step_s(self, shape: StepShape) -> float:
        """Expected time of a step; `spread` of it either way is ordinary."""
        return (
            self.base_s
            + self.prompt_token_s * shape.num_prompt_tokens
            + self.prompt_pair_s * shape.num_prompt_pairs
            + self.running_s * shape.num_running
            + self.context_token_s * shape.num_context_tokens
        )

    def prompt_s(self, num_tokens: int, start: int = 0) -> float:
        """Return the seconds that so many prompt tokens add to their steps, from position `start` on.

        Additive: the time of a prompt is the sum of its parts'. Steps' base comes on top, but once for all in a batch.
        """
        return self.prompt_token_s * num_tokens + self.prompt_pair_s * num_pairs(start, num_tokens)

    def fetch_s(self, num_tokens: Sequence[int]) -> float:
        """Expected time to fetch so many tokens' KV from each of a holder's tiers."""
        return self.fetch_latency_s + sum(n * each for n, each in zip(num_tokens, self.fetch_token_s, strict=True))

    @property
    def fetch_token_s(self) -> PerTier:
        """Per tier, in the order of TIERS."""
        return self.fetch_device_s, self.fetch_host_s, self.fetch_store_s, self.fetch_disk_s

    def fetching_pays(self, num_fetched: Sequence[int], start: int, slowness: float = 1.0) -> bool:
        """Whether the tokens from position `start` on, so many from each tier, are fetched sooner than computed.

        `slowness`: how many times the usual time a fetch from this holder takes.
        """
        return slowness * self.fetch_s(num_fetched) < self.prompt_s(sum(num_fetched), start)

    def to_wire(self) -> dict[str, float]:
        """Return the rates by name, as `Rates` of worker.proto has them."""
        return asdict(self)

    @classmethod
    def from_wire(cls, values: Mapping[str, float]) -> Rates:
        """Read a peer's rates. A field that is missing, or no positive number of a sane size, stays at its default."""
        return cls(**{name: v for name, v in values.items() if name in _KNOWN and 0 < v < _MAX_VALUE})

    def to_row(self) -> tuple[float, ...]:
        """Return the rates in the order of the fields."""
        row: tuple[float, ...] = _row_of(self)
        return row


GUESSED = Rates()
_NAMES = [each.name for each in fields(Rates)]
_KNOWN = frozenset(_NAMES)
_row_of = attrgetter(*_NAMES)  # `astuple` copies what it finds, which takes twenty times as long
_MAX_VALUE = 1e9
_STEP_FIELDS = ("base_s", "prompt_token_s", "prompt_pair_s", "running_s", "context_token_s")
_FETCH_FIELDS = ("fetch_latency_s", "fetch_device_s", "fetch_host_s", "fetch_store_s", "fetch_disk_s")
_PLACES = {name: place for place, name in enumerate(_NAMES)}
_AVERAGED = {"num_steps": (*_STEP_FIELDS, "spread"), "num_fetches": _FETCH_FIELDS}
"""By what each rests on."""


def mean_rates(workers: Iterable[Rates]) -> Rates:
    """Average several workers of one model, each by what its rates rest on; the guess where nobody has learnt."""
    return mean_of_rows(np.array([each.to_row() for each in workers], np.float64).reshape(-1, len(_NAMES)))


def mean_of_rows(rows: NDArray[np.float64]) -> Rates:
    """The same of workers as an array, [workers, fields of Rates]."""
    values: dict[str, float] = {}
    for count, names in _AVERAGED.items():
        weights = rows[:, _PLACES[count]]
        total = values[count] = float(weights.sum())
        if total:
            columns = rows[:, [_PLACES[name] for name in names]]
            values |= dict(zip(names, ((columns * weights[:, None]).sum(0) / total).tolist(), strict=True))
    return Rates(**values)


class RateLearner:
    """Learns one worker's rates. Steps are observed by one thread, fetches by one; `rates` may be read by any."""

    def __init__(self) -> None:
        self.rates = guess = GUESSED
        """As learnt so far: the very same object until there is news."""
        self._steps = _Line([getattr(guess, name) for name in _STEP_FIELDS])
        self._fetches = _Line([getattr(guess, name) for name in _FETCH_FIELDS])
        self._slowness: dict[str, float] = {}  # by holder, the one heard of longest ago first

    def step_ended(self, shape: StepShape, seconds: float) -> None:
        """Learn from a step. Steps with prompts are forgotten apart, so decoding does not erase what a prompt costs."""
        if self._steps.observe((1, *shape), seconds, kind=int(shape.num_prompt_tokens > 0)):
            self._tell()

    def fetched(self, holder_id: str, tier: str, num_tokens: int, seconds: float) -> None:
        """A fetch has taken so long; `tier`: of the slowest of its blocks."""
        if tier not in TIERS or seconds <= 0:
            return
        per_tier = tokens_of(tier, num_tokens)
        if self._fetches.observe((1, *per_tier), seconds):
            self._tell()
        times_expected = min(max(seconds / self.rates.fetch_s(per_tier), 1 / _MAX_SLOWNESS), _MAX_SLOWNESS)
        old = self._slowness.pop(holder_id, times_expected)
        self._slowness[holder_id] = old + _SLOWNESS_WEIGHT * (times_expected - old)
        if len(self._slowness) > _MAX_HOLDERS:
            del self._slowness[next(iter(self._slowness))]

    def slowness(self, holder_id: str) -> float:
        """Return how many times the expected time that holder's fetches take. 1: as the others, or not known."""
        return self._slowness.get(holder_id, 1.0)

    def _tell(self) -> None:
        steps, fetches = self._steps, self._fetches
        self.rates = Rates(
            **dict(zip(_STEP_FIELDS, steps.coefficients, strict=True)),
            **dict(zip(_FETCH_FIELDS, fetches.coefficients, strict=True)),
            spread=steps.spread,
            num_steps=steps.weight,
            num_fetches=fetches.weight,
        )


_MAX_HOLDERS = 256
_MAX_SLOWNESS = 100.0
_SLOWNESS_WEIGHT = 0.3  # of a new fetch in its holder's slowness
_FADING = 0.99  # of an observation, with each later one of its kind: a memory of about 100
_RIDGE = 0.001  # of one observation
_FLOOR = 0.01  # of the scaled guess
_SPREAD_WEIGHT = 0.05  # of a new miss in the spread
_EAGER, _EVERY = 16, 8  # solved after each of the first observations, then after every eighth


class _Line:
    """seconds = coefficients . x, learnt online: least squares of the relative error, with forgetting, bounded below.

    Kept are the normal equations, the sums of x x^T and of x seconds, with a weight of 1 / max(measured, expected)^2 on
    each observation: relative errors count, and a stall of a hundred times the usual moves the line by a hundredth of
    that. Old ones fade (recursive least squares with a forgetting factor: Haykin, Adaptive Filter Theory). A ridge of a
    small part of one observation pulls each coefficient to its guess times the one factor that suits the measurements
    best, and so decides what they do not. A coefficient that comes out below a hundredth of its scaled guess is put
    there, and the others solved again (an active set, as in Lawson and Hanson's NNLS): none is ever zero or negative.
    """

    def __init__(self, guess: Sequence[float]) -> None:
        self._guess = np.array(guess)
        self.coefficients: Sequence[float] = tuple(guess)
        self.spread = 1.0
        self._num_seen = 0
        # Not in the sums yet: kind, x, seconds, the larger of measured and expected seconds. A step should cost little.
        self._new: list[tuple[int, Sequence[float], float, float]] = []
        # Per kind: weight, x x^T, x seconds.
        size = len(guess)
        self._weight, self._products, self._targets = np.zeros(2), np.zeros((2, size, size)), np.zeros((2, size))

    @property
    def weight(self) -> float:
        """Number of observations that the coefficients rest on."""
        return float(self._weight.sum())

    def observe(self, values: Sequence[float], seconds: float, kind: int = 0) -> bool:
        """Book a measurement, which makes those of its kind fade; whether the coefficients have been solved anew."""
        if seconds <= 0:
            return False
        expected = sum(map(mul, self.coefficients, values))
        larger = max(seconds, expected)
        self._num_seen += 1
        self.spread += max(_SPREAD_WEIGHT, 1 / self._num_seen) * (abs(seconds - expected) / larger - self.spread)
        self._new.append((kind, values, seconds, larger))
        if self._num_seen > _EAGER and self._num_seen % _EVERY:
            return False
        for each in (0, 1):
            self._add(each, [observed[1:] for observed in self._new if observed[0] == each])
        self._new.clear()
        self._solve()
        return True

    def _add(self, kind: int, observed: Sequence[tuple[Sequence[float], float, float]]) -> None:
        """Add observations of one kind to its sums, and let the older ones fade."""
        if not observed:
            return
        x, seconds, larger = (np.array(column, dtype=np.float64) for column in zip(*observed, strict=True))
        fading = _FADING ** np.arange(len(observed))[::-1]
        for sums in (self._weight, self._products, self._targets):
            sums[kind] *= _FADING ** len(observed)
        weighted = x.T * (fading / larger**2)
        self._weight[kind] += fading.sum()
        self._products[kind] += weighted @ x
        self._targets[kind] += weighted @ seconds

    def _solve(self) -> None:
        products, targets, guess = self._products.sum(0), self._targets.sum(0), self._guess
        scaled = guess * (guess @ targets) / (guess @ products @ guess)
        # In multiples of the scaled guess, so that the ridge means the same to all.
        products = products * np.outer(scaled, scaled) + _RIDGE * np.eye(len(guess))
        targets = targets * scaled + _RIDGE
        solution, free = np.full(len(guess), _FLOOR), np.full(len(guess), True)
        while free.any():
            rest = targets[free] - products[np.ix_(free, ~free)] @ solution[~free]
            solution[free] = np.linalg.solve(products[np.ix_(free, free)], rest)
            too_low = free & (solution < _FLOOR)
            if not too_low.any():
                break
            solution[too_low], free = _FLOOR, free & ~too_low
        self.coefficients = (solution * scaled).tolist()
