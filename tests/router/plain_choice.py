"""The choice of workers as a plain scan: every candidate is scored by itself, and all are sorted. What the router's
tables must agree with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from operator import truediv
from typing import TypeVar

from services.budgets import Budgets, Role, prompt_pace
from services.rates import StepShape
from services.router.routing.bending import LET_THROUGH
from services.router.routing.candidates import (
    NO_OBJECTIVES,
    Bending,
    DecodeCandidate,
    PrefillCandidate,
    RoutedRequest,
    holds,
)
from services.router.routing.cost import (
    CostModel,
    DecodeTerms,
    Held,
    KnownPrefix,
    PrefillTerms,
    handoff_tokens,
)
from services.router.routing.numerics import prefer_equal
from services.router.routing.policies import MAX_PREFILL_TARGETS, Decision, Policy, PolicyState, Refusal
from services.router.routing.tables import word


@dataclass(frozen=True)
class _Scored:
    """A ready decode worker with its terms and with the prefill workers that fit it, in order."""

    worker: DecodeCandidate
    terms: DecodeTerms
    local: PrefillTerms
    is_sooner: bool
    """The prompt is computed here, since it would be late by the prefill workers."""
    targets: tuple[_ScoredPrefill, ...]

    @property
    def load(self) -> int:
        return self.worker.num_outstanding


@dataclass(frozen=True)
class _ScoredPrefill:
    worker: PrefillCandidate
    terms: PrefillTerms

    @property
    def load(self) -> int:
        return self.worker.num_outstanding_tokens


S = TypeVar("S", _Scored, _ScoredPrefill)
W = TypeVar("W", DecodeCandidate, PrefillCandidate)


def choose(
    request: RoutedRequest,
    decode: Sequence[DecodeCandidate],
    prefill: Sequence[PrefillCandidate],
    exclude: Collection[str] = (),
    *,
    among: Collection[str] = (),
    policy: Policy = Policy.KV,
    state: PolicyState | None = None,
    cost: CostModel | None = None,
) -> Decision | Refusal:
    """The decode worker and the prefill targets for a request. `exclude`: decode workers that were tried already."""
    connected = _ready(request, decode, exclude, among)
    if isinstance(connected, Refusal):
        return connected
    alike = prefer_equal(request.numerics, connected)
    ready = _by_role(alike, "decode") or alike
    cost = cost or CostModel()
    state = state or PolicyState()
    bends = policy is Policy.KV and request.objectives != NO_OBJECTIVES
    bends = bends and any(worker.bending.is_elastic for worker in alike)
    if bends and _by_role(alike, "decode"):
        idle = [each for each in alike if each.bending.is_prefill_first and not each.num_waiting_tokens]
        ready = [*_by_role(alike, "decode"), *idle]
    targets = {
        fingerprint: _ordered_prefill(request, fingerprint, prefill, policy, state, cost, bends)
        for fingerprint in {worker.model_fingerprint for worker in ready}
    }
    scored = _best_first(
        [_score_decode(cost, request, worker, targets[worker.model_fingerprint], bends) for worker in ready],
        request, policy, state, cost.bounded_load_factor, cost.bounded_load_slack_requests,
    )  # fmt: skip
    best = scored[0]
    by = best.local if best.terms.prefills else best.targets[0].terms
    return Decision(
        decode=best.worker,
        prefill=tuple(
            target.worker
            for target in best.targets[:MAX_PREFILL_TARGETS]
            if not (best.worker.bending.is_elastic and target.worker.worker_id == best.worker.worker_id)
        ),
        deflected="answer" if best.worker.bending.is_prefill_first else "prompt" if best.is_sooner else "",
        reason="",
        policy=policy,
        prefilled_by=by,
        sources=useful_sources(cost, request.prefix(best.worker.model_fingerprint), except_worker=by.worker_id),
        decode_terms=tuple(member.terms for member in scored),
        prefill_terms=tuple(target.terms for target in best.targets),
    )


def _ready(
    request: RoutedRequest, decode: Sequence[DecodeCandidate], exclude: Collection[str], among: Collection[str]
) -> list[DecodeCandidate] | Refusal:
    heard = {worker.model_fingerprint for worker in decode if worker.connected and not worker.is_suspect}
    serving = [worker for worker in decode if _serves(request, worker) and (not among or worker.worker_id in among)]
    if not serving:
        return Refusal.NO_WORKER
    untried = [worker for worker in serving if worker.worker_id not in exclude]
    if not untried:
        return Refusal.ALL_TRIED
    connected = [
        worker
        for worker in untried
        if worker.connected and not (worker.is_suspect and worker.model_fingerprint in heard)
    ]
    if not connected:
        return Refusal.NOT_CONNECTED
    stay = [worker for worker in connected if not worker.draining]
    if not stay and not request.has_begun:
        return Refusal.DRAINING
    return _long_enough(request, stay or connected) or Refusal.TOO_SHORT


def _by_role(workers: Sequence[W], role: Role) -> list[W]:
    return [worker for worker in workers if worker.bending.role in (None, role)]


def _serves(request: RoutedRequest, worker: DecodeCandidate) -> bool:
    is_wanted = request.fingerprints is None or worker.model_fingerprint in request.fingerprints
    return (
        request.model in worker.model_names
        and is_wanted
        and (not request.adapter or request.adapter in worker.adapters)
    )


def _long_enough(request: RoutedRequest, workers: Sequence[DecodeCandidate]) -> list[DecodeCandidate]:
    """Who holds it to its end. Else, once it has begun, who holds it for a while: it may end sooner, or go on again."""
    whole = [worker for worker in workers if holds(worker, request.num_final_tokens)]
    if whole or not request.has_begun:
        return whole
    return [worker for worker in workers if holds(worker, request.num_prompt_tokens + 1)]


# ---- prefill workers ----------------------------------------------------------


def _ordered_prefill(
    request: RoutedRequest,
    model_fingerprint: str,
    prefill: Sequence[PrefillCandidate],
    policy: Policy,
    state: PolicyState,
    cost: CostModel,
    bends: bool,
) -> tuple[_ScoredPrefill, ...]:
    """The prefill workers whose blocks a decode worker of that fingerprint can use, best first."""
    prefix = request.prefix(model_fingerprint)
    # A token more than it says: else it would be the answer's last one there.
    num_tokens = min(request.num_prompt_tokens + 2, request.num_final_tokens or sys.maxsize)

    def terms_of(worker: PrefillCandidate) -> PrefillTerms:
        terms = prefill_terms(cost, worker.worker_id, worker.num_outstanding_tokens, request.num_prompt_tokens, prefix)
        return _bent(cost, request, worker.bending, terms) if bends else terms

    fitting = [
        _ScoredPrefill(worker, terms_of(worker))
        for worker in _by_role(prefill, "prefill")
        if request.model in worker.model_names
        and (not request.adapter or request.adapter in worker.adapters)
        and worker.model_fingerprint == model_fingerprint
        and not worker.draining
        and holds(worker, num_tokens)
    ]
    factor, slack = cost.bounded_load_factor, cost.bounded_load_slack_tokens
    return tuple(_best_first(fitting, request, policy, state, factor, slack))


# ---- decode workers -----------------------------------------------------------


def _bent(cost: CostModel, request: RoutedRequest, bending: Bending, terms: PrefillTerms) -> PrefillTerms:
    """With what the worker's streams and the objective add: `prompt_beside_s` of services/budgets, and the rest."""
    rates, num_own, num_queued = cost.rates, terms.num_computed_tokens, int(terms.queued)
    start = request.num_prompt_tokens - num_own
    streams = StepShape(num_running=bending.num_running, num_context_tokens=bending.num_context_tokens)
    steps_s = rates.base_s
    if bending.num_running:
        budgets = Budgets(bending.tpot_budget_s, bending.prompt_budget)
        room = max(prompt_pace(budgets, rates, streams, start + num_own // 2), LET_THROUGH)
        steps_s = -(-(num_queued + num_own) // room) * rates.step_s(streams)
    expected_s = steps_s + num_queued * rates.prompt_token_s + rates.prompt_s(num_own, start)
    expected_s += (terms.load + terms.fetch) * rates.prompt_token_s
    beside = (steps_s - rates.base_s) / rates.prompt_token_s
    return replace(terms, beside=beside, late=_late(cost, request, expected_s), expected_s=expected_s)


def _margin(cost: CostModel) -> float:
    return 1 + cost.rates.spread if cost.rates.num_steps else 1.0


def _late(cost: CostModel, request: RoutedRequest, expected_s: float) -> float:
    late_s = max(expected_s * _margin(cost) - request.objectives.ttft_s, 0.0)
    return late_s / cost.rates.prompt_token_s * cost.lateness_weight


def _stall(cost: CostModel, request: RoutedRequest, worker: DecodeCandidate) -> float:
    """What a step with one more stream takes beyond the budget."""
    bending, rates = worker.bending, cost.rates
    coming = 0 if bending.is_prefill_first else max(worker.num_outstanding - bending.num_running, 0)
    context = bending.num_context_tokens + (coming + 1) * request.num_prompt_tokens
    shape = StepShape(num_running=bending.num_running + coming + 1, num_context_tokens=context)
    over_s = max(rates.step_s(shape) - min(bending.tpot_budget_s, request.objectives.tpot_s), 0.0)
    return over_s * request.num_output_tokens / rates.prompt_token_s * cost.stall_weight


def _occupied(cost: CostModel, request: RoutedRequest, worker: DecodeCandidate) -> float:
    """What a stream takes of a worker that computes prompts first."""
    if not worker.bending.is_prefill_first:
        return 0.0
    own_s = cost.rates.running_s + cost.rates.context_token_s * request.num_prompt_tokens
    step_s = own_s if worker.bending.num_running else cost.rates.base_s + own_s
    return step_s * request.num_output_tokens / cost.rates.prompt_token_s * cost.new_work_weight


def _score_decode(
    cost: CostModel,
    request: RoutedRequest,
    worker: DecodeCandidate,
    targets: tuple[_ScoredPrefill, ...],
    bends: bool,
) -> _Scored:
    prefix = request.prefix(worker.model_fingerprint)
    local = prefill_terms(cost, worker.worker_id, worker.num_waiting_tokens, request.num_prompt_tokens, prefix)
    own = prefix.own(worker.worker_id)
    # What the worker brings into its paged cache before it decides whether to prefill.
    num_missing = max(request.num_prompt_tokens - sum(own.num_per_tier[:2]) * prefix.block_size, 1)
    prefills = (
        worker.colocated
        or worker.bending.is_prefill_first
        or not targets
        or num_missing <= worker.local_prefill_max_tokens
    )
    if bends:
        local = _bent(cost, request, worker.bending, local)
    num_new_blocks = max(-(-request.num_prompt_tokens // prefix.block_size) - own.num_blocks, 0)
    num_waiting = max(worker.num_outstanding + 1 - worker.max_num_seqs, 0) if worker.max_num_seqs else 0
    use = 1 - worker.num_free_blocks / worker.num_blocks if worker.num_blocks else 0.0
    shortage = max(num_new_blocks - max(worker.num_free_blocks, 0), 0) if worker.num_blocks else 0
    is_sooner, expected_s = False, local.expected_s
    if bends and not prefills:
        reads_s = handoff_tokens(cost, num_new_blocks, prefix.block_size) * cost.rates.prompt_token_s
        via_s = targets[0].terms.expected_s + reads_s
        is_late = via_s * _margin(cost) > request.objectives.ttft_s
        is_in_time_here = local.expected_s * _margin(cost) <= request.objectives.ttft_s
        is_much_sooner = local.expected_s < (1 - cost.deflection_gain) * via_s
        is_sooner = worker.bending.is_elastic and is_late and local.expected_s < via_s
        is_sooner = is_sooner and (is_in_time_here or is_much_sooner)
        prefills = prefills or is_sooner
        expected_s = local.expected_s if prefills else via_s
    terms = DecodeTerms(
        worker_id=worker.worker_id,
        prefills=prefills,
        prefill=local.work if prefills else targets[0].terms.work,
        handoff=0.0 if prefills else handoff_tokens(cost, num_new_blocks, prefix.block_size),
        running=worker.num_outstanding * cost.request_tokens,
        queued=num_waiting * cost.queued_request_tokens,
        # In steps, so that a few blocks more or less leave a tie a tie.
        kv_use=math.floor(min(max(use, 0.0), 1.0) * 10) / 10 * cost.kv_use_tokens,
        kv_shortage=float(shortage * prefix.block_size),
        late=_late(cost, request, expected_s) if bends else 0.0,
        stall=_stall(cost, request, worker) if bends else 0.0,
        occupied=_occupied(cost, request, worker) if bends else 0.0,
        expected_s=expected_s if bends else 0.0,
    )
    return _Scored(worker, terms, local, is_sooner, targets)


# ---- the order of both --------------------------------------------------------


def _best_first(
    scored: Sequence[S], request: RoutedRequest, policy: Policy, state: PolicyState, load_factor: float, load_slack: int
) -> list[S]:
    # "Consistent hashing with bounded loads" (Mirrokni, Thorup, Zadimoghaddam 2016), with rendezvous hashing.
    bound = load_factor * sum(member.load for member in scored) / max(len(scored), 1) + load_slack

    def key(member: S) -> tuple[object, ...]:
        worker_id = member.worker.worker_id
        if policy is Policy.ROUND_ROBIN:
            return state.last_turn.get(worker_id, 0), worker_id
        tie = _tie(request.key, worker_id)
        if policy is Policy.KV:
            return member.terms.total, tie
        return member.load if policy is Policy.LEAST_LOADED else member.load > bound, tie

    return sorted(scored, key=key)


def _tie(key: bytes, worker_id: str) -> int:
    mixed = word(key) ^ word(worker_id.encode())
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
    return mixed


def prefill_terms(
    cost: CostModel, worker_id: str, num_queued_tokens: int, num_prompt_tokens: int, prefix: KnownPrefix
) -> PrefillTerms:
    """The terms of one worker: after its own hit it fetches from the best other holder, if that beats computing."""
    own, rates = prefix.own(worker_id), cost.rates
    load = cost.tokens(sum(map(truediv, own.num_per_tier, cost.load_tokens_per_s)) * prefix.block_size)

    def terms(num_fetched: int, holder_id: str, fetch: float) -> PrefillTerms:
        num_cached = (own.num_blocks + num_fetched) * prefix.block_size
        num_computed = max(num_prompt_tokens - num_cached, 1)
        return PrefillTerms(
            worker_id=worker_id,
            queued=num_queued_tokens,
            num_own_blocks=own.num_blocks,
            load=load,
            num_fetched_blocks=num_fetched,
            fetched_from=holder_id,
            fetch=fetch,
            num_computed_tokens=num_computed,
            compute=cost.tokens(rates.prompt_s(num_computed, num_prompt_tokens - num_computed)) * cost.new_work_weight,
        )

    options = [terms(0, "", 0.0)]
    for holder_id, held in prefix.held.items():
        tail = [count * prefix.block_size for count in held.tail(own.num_blocks)]
        if holder_id != worker_id and rates.fetching_pays(tail, own.num_blocks * prefix.block_size):
            fetch = cost.tokens(rates.fetch_s(tail))
            options.append(terms(held.num_blocks - own.num_blocks, holder_id, fetch))
    return min(options, key=lambda option: (option.fetch + option.compute, option.fetched_from))


def useful_sources(cost: CostModel, prefix: KnownPrefix, except_worker: str) -> tuple[str, ...]:
    """The holders of a prefix, best first for someone who has nothing. Whether to fetch, the worker decides."""

    def gain(held: Held) -> float:
        num_tokens = [count * prefix.block_size for count in held.num_per_tier]
        return cost.rates.prompt_s(sum(num_tokens)) - cost.rates.fetch_s(num_tokens)

    gains = {holder_id: gain(held) for holder_id, held in prefix.held.items() if holder_id != except_worker}
    return tuple(sorted(gains, key=lambda key: (-gains[key], key)))
