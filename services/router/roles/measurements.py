"""What the controller decides from, as plain numbers, and what is wrong with them. Pure.

A number that is missing, old, not finite, negative, or at odds with another one is a wrong measurement: who decides by
it would flip a fleet for nothing. So it is named, and nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from services.budgets import Budgets, Role
from services.rates import GUESSED, Rates

_ROLES: Final = ("prefill", "decode")
_MAX_RATIO: Final = 1e6


@dataclass(frozen=True)
class WorkerView:
    """One worker of the model, as it has said last."""

    worker_id: str
    incarnation: str
    role: Role
    budgets: Budgets
    is_fixed: bool
    """Its role is the operator's: it counts, and is never changed."""
    is_ready: bool
    """Connected, not draining, not suspect, serving."""
    age_s: float
    """Since its last word. Of a worker that has no session with the router: 0 while it is registered."""
    num_running: int
    num_context_tokens: int
    num_waiting_tokens: int
    """Of prompts, not yet computed."""
    max_running: int
    num_kv_tokens: int
    """That fit into its blocks."""
    kv_usage: float
    """Of its blocks, the part that running requests hold: 0 to 1."""
    rates: Rates = GUESSED


@dataclass(frozen=True)
class Attainment:
    """How the requests fared that got their first token, or ended, within the window."""

    num_requests: int
    num_ttft_met: int
    num_tpot_met: int
    ttft_ratio: float
    """The 90th percentile of time to first token, each in parts of its own objective: above 1 it is missed."""
    tpot_ratio: float


@dataclass(frozen=True)
class Demand:
    """What has come in within the window, whether or not it could be served: so it does not follow from the roles."""

    requests_per_s: float
    prompt_tokens: float
    """Mean of a request, those alone that must be computed."""
    cached_tokens: float
    """Mean of a request, in front of these."""
    output_tokens: float
    """Mean of a request, of those that have ended."""


@dataclass(frozen=True)
class FleetView:
    """All workers of one model at one moment."""

    at_s: float
    """By any clock that runs evenly."""
    model: str
    workers: tuple[WorkerView, ...]
    attainment: Attainment | None
    """None: too few requests have ended to say."""
    demand: Demand | None
    """None: it is not known."""
    prefill_wait_s: float
    """Expected from a prompt's arrival until a worker whose role is prefill begins with it."""
    step_s: float
    """Of a step with streams alone, at the slowest of the workers whose role is decode: 0 without streams."""

    def ready(self, role: Role) -> tuple[WorkerView, ...]:
        """Those of a role that work."""
        return tuple(worker for worker in self.workers if worker.is_ready and worker.role == role)


def wrong_measurement(view: FleetView, max_age_s: float) -> str:
    """What is wrong with the first wrong measurement, with its numbers; empty: all can be used."""
    return next(_wrong(view, max_age_s), "")


def _wrong(view: FleetView, max_age_s: float) -> Iterator[str]:
    yield from _not_counts(
        view.model or "fleet", at_s=view.at_s, prefill_wait_s=view.prefill_wait_s, step_s=view.step_s
    )
    keys = [worker.worker_id for worker in view.workers if worker.is_ready]
    if len(set(keys)) < len(keys):
        yield f"{len(keys)} ready workers have {len(set(keys))} names"
    for worker in view.workers:
        if worker.is_ready:
            yield from _wrong_worker(worker, max_age_s)
    ready = [worker for worker in view.workers if worker.is_ready]
    if ready and not any(worker.rates.num_steps for worker in ready):
        yield f"none of {len(ready)} ready workers has learnt how fast it is"
    if view.attainment is not None:
        yield from _wrong_attainment(view.attainment)
    if view.demand is None:
        yield "demand is missing"
    else:
        yield from _not_counts("demand", **vars(view.demand))


def _wrong_worker(worker: WorkerView, max_age_s: float) -> Iterator[str]:
    name = f"worker {worker.worker_id}"
    if worker.role not in _ROLES:
        yield f"{name}: role is {worker.role!r:.40}"
    counts = ("age_s", "num_running", "num_context_tokens", "num_waiting_tokens", "max_running", "num_kv_tokens")
    yield from _not_counts(name, **{field: getattr(worker, field) for field in (*counts, "kv_usage")})
    if worker.age_s > max_age_s:
        yield f"{name}: its last word is {worker.age_s:.3g} s old, above {max_age_s:g}"
    if not worker.budgets.tpot_s > 0 or worker.budgets.prompt_tokens < 0:
        yield f"{name}: budgets of {worker.budgets.tpot_s:.3g} s and {worker.budgets.prompt_tokens} prompt tokens"
    if min(worker.max_running, worker.num_kv_tokens) < 1:
        yield f"{name}: room for {worker.max_running} requests and {worker.num_kv_tokens} tokens"
    if worker.num_running > worker.max_running:
        yield f"{name}: num_running is {worker.num_running}, above its {worker.max_running}"
    if worker.num_context_tokens > 0 and not worker.num_running:
        yield f"{name}: {worker.num_context_tokens} context tokens of no running request"
    if worker.kv_usage > 1:
        yield f"{name}: kv_usage is {worker.kv_usage:.3g}, above 1"
    rates = worker.rates
    if not all(0 <= value < _MAX_RATIO for value in (rates.base_s, rates.prompt_token_s, rates.prompt_pair_s)):
        yield f"{name}: impossible rates of prompts"
    if not all(0 <= value < _MAX_RATIO for value in (rates.running_s, rates.context_token_s)):
        yield f"{name}: impossible rates of streams"


def _wrong_attainment(attainment: Attainment) -> Iterator[str]:
    yield from _not_counts("attainment", **vars(attainment))
    most = max(attainment.num_ttft_met, attainment.num_tpot_met)
    if most > attainment.num_requests:
        yield f"attainment: {most} of {attainment.num_requests} requests have met an objective"


def _not_counts(whose: str, **values: float) -> Iterator[str]:
    for name, value in values.items():
        if not math.isfinite(value) or value < 0:
            yield f"{whose}: {name} is {value:.3g}"
