"""Orders the workers for a request: a pure function of tables. No clock, no I/O, no state.

Every policy puts the decode workers and the prefill workers in an order. The decode worker takes the first prefill
worker that it can reach, or computes the prompt by itself where little of it is missing. Ties are broken by a
rendezvous hash of (the request's key, the worker): prompts that begin equally meet at the same worker, others spread,
and when a worker leaves only its own move.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Literal, TypeAlias

import numpy as np

from services.router.routing.bending import Bend, Weighed
from services.router.routing.candidates import NO_OBJECTIVES, DecodeCandidate, PrefillCandidate, RoutedRequest
from services.router.routing.cost import CostModel, DecodeTerms, PrefillTerms, useful_sources
from services.router.routing.numerics import is_alike
from services.router.routing.scoring import DecodeCosts, Works, decode_costs, prefill_costs
from services.router.routing.tables import Column, DecodeTable, PrefillTable, Rows, first

MAX_PREFILL_TARGETS = 3
MAX_CANDIDATES = 16
"""Of each kind, the best ones, whose terms a decision has."""


Deflection: TypeAlias = Literal["", "prompt", "answer"]


class Policy(StrEnum):
    """The ways to order workers."""

    KV = "kv"  # least cost of the pair (cost.py): queues, what is missing of the prefix, decode load
    LEAST_LOADED = "least-loaded"  # fewest requests, fewest prompt tokens
    ROUND_ROBIN = "round-robin"  # longest not chosen
    PREFIX_HASH = "prefix-hash"  # rendezvous hash of the first tokens, passing over whom it has overloaded


@dataclass(frozen=True)
class PolicyState:
    """A policy's memory; whoever calls `choose` takes the decision's over."""

    last_turn: Mapping[str, int] = field(default_factory=dict)
    """round-robin: when each worker was last chosen, counted in decisions."""


class Refusal(Enum):
    """The reasons why no decode worker was chosen. The value is the metric label."""

    NO_WORKER = "no_worker"  # none is registered for the model
    NOT_CONNECTED = "not_connected"
    DRAINING = "draining"
    ALL_TRIED = "all_tried"
    TOO_SHORT = "too_short"  # the context of each of them


@dataclass(frozen=True)
class Decision:
    """The chosen workers, and what candidates would have cost. `reason` says in words what decided."""

    decode: DecodeCandidate
    prefill: tuple[PrefillCandidate, ...]
    """Best first, three at most."""
    reason: str
    policy: Policy
    prefilled_by: PrefillTerms
    """Of the worker that is expected to prefill: the decode worker, or the first of `prefill`."""
    sources: tuple[str, ...]
    """Other holders of the prompt's prefix, the most useful first."""
    decode_terms: tuple[DecodeTerms, ...]
    """Of those that were ready, best first."""
    prefill_terms: tuple[PrefillTerms, ...]
    """Of those that fit the decode worker, best first."""
    deflected: Deflection = ""
    """What is done there though the workers' roles have another place for it: the `prompt` is computed where it
    decodes, or the `answer` decoded where its prompt is computed."""
    weighed: Weighed | None = None
    """What spoke for and against that; None: nothing bends."""

    @property
    def prefills_locally(self) -> bool:
        return self.prefilled_by.worker_id == self.decode.worker_id

    @property
    def cause(self) -> str:
        """`reason` in one word of a few, for the metric."""
        if self.deflected:
            return "deflected"
        if len(self.decode_terms) == 1 and len(self.prefill_terms) <= 1:
            return "only"
        if self.policy is Policy.ROUND_ROBIN:
            return "turn"
        if self.policy is Policy.PREFIX_HASH:
            return "hash"
        if self.policy is Policy.KV and self.prefilled_by.num_own_blocks:
            return "prefix"
        if self.policy is Policy.KV and self.prefilled_by.num_fetched_blocks:
            return "fetch"
        return "load"


def next_state(state: PolicyState, decision: Decision, known: Collection[str]) -> PolicyState:
    """The state after a decision was carried out. `known`: the workers there are; others are forgotten."""
    if decision.policy is not Policy.ROUND_ROBIN:
        return state
    turn = max(state.last_turn.values(), default=0) + 1
    chosen = [decision.decode.worker_id, *(worker.worker_id for worker in decision.prefill[:1])]
    kept = {worker_id: last for worker_id, last in state.last_turn.items() if worker_id in known}
    return PolicyState(kept | dict.fromkeys(chosen, turn))


def choose(
    request: RoutedRequest,
    decode: DecodeTable,
    prefill: PrefillTable,
    exclude: Collection[str] = (),
    *,
    among: Collection[str] = (),
    policy: Policy = Policy.KV,
    state: PolicyState | None = None,
    cost: CostModel | None = None,
) -> Decision | Refusal:
    """The decode worker and the prefill targets for a request. `exclude`: decode workers that were tried already;
    `among`: those alone that may be chosen, empty: any."""
    ready = _ready(request, decode, exclude, among)
    if isinstance(ready, Refusal):
        return ready
    cost = cost or CostModel()
    bend = _bend(request, policy, cost, decode, ready)
    ready = _in_role(decode, ready, bends=bend is not None)
    order = _Order(request, policy, state or PolicyState(), cost.bounded_load_factor)
    works: dict[str, Works] = {}
    targets: dict[str, _Targets] = {}
    parts = []
    for fingerprint, rows in decode.by_fingerprint(ready):
        works[fingerprint] = Works(cost, request, fingerprint)
        targets[fingerprint] = _prefill_targets(request, order, cost, works[fingerprint], fingerprint, prefill, bend)
        best_prefill = targets[fingerprint].best
        parts.append(decode_costs(cost, request, works[fingerprint], decode, rows, best_prefill, bend))
    costs = DecodeCosts.joined(parts)
    load = decode.columns["num_outstanding"][costs.rows]
    places = order.first(decode, costs.rows, load, cost.bounded_load_slack_requests, costs.total)
    terms = tuple(costs.terms(decode, place) for place in places)
    best, worker = terms[0], decode.workers[costs.rows[places[0]]]
    of_worker = targets[worker.model_fingerprint]
    by = of_worker.best
    if by is None or best.prefills:
        by = works[worker.model_fingerprint].at(worker.worker_id, worker.num_waiting_tokens)
        by = by if costs.bent is None else costs.bent.local.added(by, places[0])
    deflected, weighed = _deflection(request, worker, best, of_worker.best), None
    if bend is not None and costs.bent is not None and of_worker.best is not None:
        weighed = Weighed.of(
            bend,
            of_worker.best.worker_id,
            costs.bent.via_s[places[0]].item(),
            costs.bent.local.expected_s[places[0]].item(),
        )
    return Decision(
        decode=worker,
        prefill=_others(of_worker.workers, worker),
        reason=_reason(policy, worker, best, by, len(ready)) + (f"; {weighed}" if weighed is not None else ""),
        policy=policy,
        prefilled_by=by,
        sources=useful_sources(cost, request.prefix(worker.model_fingerprint), by.worker_id, MAX_CANDIDATES),
        decode_terms=terms,
        prefill_terms=of_worker.terms,
        deflected=deflected,
        weighed=weighed,
    )


def _others(targets: tuple[PrefillCandidate, ...], worker: DecodeCandidate) -> tuple[PrefillCandidate, ...]:
    """An elastic worker may stand among its own prefill workers."""
    if not worker.bending.is_elastic:
        return targets
    return tuple(each for each in targets if each.worker_id != worker.worker_id)


# ---- decode workers -----------------------------------------------------------


def _ready(
    request: RoutedRequest, decode: DecodeTable, exclude: Collection[str], among: Collection[str]
) -> Rows | Refusal:
    rows = decode.serving(request.model, request.adapter, request.fingerprints)
    if among:
        rows = rows[np.isin(rows, decode.rows_of(among))]
    if not len(rows):
        return Refusal.NO_WORKER
    if exclude:
        rows = rows[~np.isin(rows, decode.rows_of(exclude))]
    if not len(rows):
        return Refusal.ALL_TRIED
    rows = decode.reachable(rows)
    if not len(rows):
        return Refusal.NOT_CONNECTED
    stay = rows[~decode.columns["draining"][rows]]
    if not len(stay) and not request.has_begun:
        return Refusal.DRAINING
    rows = _long_enough(request, decode, stay if len(stay) else rows)
    if not len(rows):
        return Refusal.TOO_SHORT
    # An inexact place is better than none.
    alike = [is_alike(request.numerics, decode.workers[row].numerics) for row in rows] if request.numerics else []
    return rows[alike] if any(alike) else rows


def _long_enough(request: RoutedRequest, decode: DecodeTable, rows: Rows) -> Rows:
    """Who holds it to its end. Else, once it has begun, who holds it for a while: it may end sooner, or go on again."""
    context = decode.columns["max_model_len"][rows]
    whole = rows[context >= request.num_final_tokens]
    if len(whole) or not request.has_begun:
        return whole
    return rows[context >= request.num_prompt_tokens + 1]


# ---- where workers bend -------------------------------------------------------


def _bend(request: RoutedRequest, policy: Policy, cost: CostModel, decode: DecodeTable, ready: Rows) -> Bend | None:
    """None: there is no objective, or nobody who could bend for it."""
    if policy is not Policy.KV or request.objectives == NO_OBJECTIVES:
        return None
    if not decode.has_elastic or not decode.is_elastic[ready].any():
        return None
    return Bend(cost, request.objectives, request.num_output_tokens)


def _in_role(decode: DecodeTable, ready: Rows, bends: bool) -> Rows:
    """Those who decode first, and where workers bend those who have no prompt to compute; all, if there are none."""
    wanted = decode.by_role(ready, "decode")
    if bends and len(wanted):
        is_idle = decode.columns["num_waiting_tokens"][ready] == 0
        wanted = ready[is_idle | ~decode.columns["is_prefill_first"][ready]]
    return wanted if len(wanted) else ready


def _deflection(
    request: RoutedRequest, worker: DecodeCandidate, terms: DecodeTerms, via: PrefillTerms | None
) -> Deflection:
    if worker.bending.is_prefill_first:
        return "answer"
    if via is None or not terms.prefills or not worker.bending.is_elastic or worker.colocated:
        return ""
    prefix = request.prefix(worker.model_fingerprint)
    num_at_hand = sum(prefix.own(worker.worker_id).num_per_tier[:2]) * prefix.block_size
    is_small = max(request.num_prompt_tokens - num_at_hand, 1) <= worker.local_prefill_max_tokens
    return "" if is_small else "prompt"


# ---- prefill workers ----------------------------------------------------------


@dataclass(frozen=True)
class _Targets:
    """The prefill workers whose blocks decode workers of one fingerprint can use, best first."""

    workers: tuple[PrefillCandidate, ...]
    terms: tuple[PrefillTerms, ...]

    @property
    def best(self) -> PrefillTerms | None:
        return self.terms[0] if self.terms else None


def _prefill_targets(
    request: RoutedRequest,
    order: _Order,
    cost: CostModel,
    works: Works,
    model_fingerprint: str,
    table: PrefillTable,
    bend: Bend | None,
) -> _Targets:
    # A token more than it says: else it would be the answer's last one there.
    num_tokens = min(request.num_prompt_tokens + 2, request.num_final_tokens or sys.maxsize)
    rows = table.serving(request.model, request.adapter, (model_fingerprint,))
    rows = table.by_role(rows, "prefill")
    rows = rows[~table.columns["draining"][rows] & (table.columns["max_model_len"][rows] >= num_tokens)]
    if not len(rows):
        return _Targets((), ())
    load = table.columns["num_outstanding_tokens"][rows]
    costs = prefill_costs(works, table, rows, load, bend)
    places = order.first(table, rows, load, cost.bounded_load_slack_tokens, costs.total)
    workers = [table.workers[rows[place]] for place in places]
    terms = [works.at(worker.worker_id, worker.num_outstanding_tokens) for worker in workers]
    return _Targets(
        tuple(workers[:MAX_PREFILL_TARGETS]),
        tuple(costs.terms(each, place) for each, place in zip(terms, places, strict=True)),
    )


# ---- the order of both --------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """A policy's order of workers for a request."""

    request: RoutedRequest
    policy: Policy
    state: PolicyState
    bounded_load_factor: float

    def first(self, table: DecodeTable | PrefillTable, rows: Rows, load: Column, slack: int, total: Column) -> Rows:
        """The places of the first few of the rows, in order. `load`, `total`: of each row, what it has in front, and
        what the request costs there. `slack`: of load, beside the factor of "Consistent hashing with bounded loads"
        (Mirrokni, Thorup, Zadimoghaddam 2016), here with rendezvous hashing."""
        if len(rows) == 1:
            return np.zeros(1, np.intp)
        if self.policy is Policy.ROUND_ROBIN:
            last_turn = self.state.last_turn
            turns = np.array([last_turn.get(table.workers[row].worker_id, 0) for row in rows])
            return first(turns, table.names(rows), MAX_CANDIDATES)
        primary = total if self.policy is Policy.KV else load
        if self.policy is Policy.PREFIX_HASH:
            primary = (load > self.bounded_load_factor * int(load.sum()) / len(load) + slack).astype(np.int8)
        return first(primary, table.ties(self.request.key, rows), MAX_CANDIDATES)


def _reason(policy: Policy, worker: DecodeCandidate, terms: DecodeTerms, by: PrefillTerms, num_ready: int) -> str:
    words = {
        Policy.KV: f"costs {terms.total:.0f} tokens, the least",
        Policy.LEAST_LOADED: "which is the least",
        Policy.ROUND_ROBIN: "and was chosen longest ago",
        Policy.PREFIX_HASH: "and is where the prompt's beginning hashes to",
    }
    fetched = f" and fetches {by.num_fetched_blocks} from {by.fetched_from}" if by.fetched_from else ""
    return (
        f"{worker.worker_id} has {worker.num_outstanding} requests, {words[policy]} of {num_ready} ready workers;"
        f" {by.worker_id} prefills with {by.queued:.0f} tokens in front, has {by.num_own_blocks} blocks{fetched},"
        f" computes {by.num_computed_tokens} tokens"
    )
