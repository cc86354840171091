"""Orders the workers for a request: a pure function of a snapshot. No clock, no I/O, no state.

Every policy puts the decode workers and the prefill workers in an order. The decode worker takes the first prefill
worker that it can reach, or computes the prompt by itself where little of it is missing. Ties are broken by a
rendezvous hash of (the request's key, the worker): prompts that begin equally meet at the same worker, others spread,
and when a worker leaves only its own move.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TypeVar

from services.router.routing.cost import (
    CostModel,
    DecodeTerms,
    KnownPrefix,
    PrefillTerms,
    handoff_tokens,
    prefill_terms,
    useful_sources,
)
from services.router.routing.numerics import prefer_equal

MAX_PREFILL_TARGETS = 3


class Policy(StrEnum):
    """The ways to order workers."""

    KV = "kv"  # least cost of the pair (cost.py): queues, what is missing of the prefix, decode load
    LEAST_LOADED = "least-loaded"  # fewest requests, fewest prompt tokens
    ROUND_ROBIN = "round-robin"  # longest not chosen
    PREFIX_HASH = "prefix-hash"  # rendezvous hash of the first tokens, passing over whom it has overloaded


@dataclass(frozen=True)
class DecodeCandidate:
    """A decode worker as this router sees it now."""

    worker_id: str
    incarnation: str
    model_names: tuple[str, ...]
    model_fingerprint: str
    connected: bool
    draining: bool
    num_outstanding: int
    """Requests in front of a new one: what the worker last reported and what was sent since, or what this router has
    there, whichever is more."""
    num_waiting_tokens: int = 0
    """Prompt tokens to be computed there: what the worker last reported, or what this router expects it to compute,
    whichever is more."""
    max_num_seqs: int = 0
    """Its largest batch; 0: not known."""
    num_blocks: int = 0
    """Of its pool; 0: not known."""
    num_free_blocks: int = 0
    """Evictable ones included; as last reported, less what was sent since."""
    colocated: bool = False
    """It prefills everything by itself."""
    local_prefill_max_tokens: int = 0
    """It prefills by itself what lacks no more than so many."""
    is_simulation: bool = False
    """Its tokens mean nothing."""
    max_model_len: int = 0
    """Prompt and output tokens of one request; 0: not known."""
    numerics: str = ""
    """Names its arithmetic (numerics.py)."""
    is_exact: bool = False
    """It computes the same bits as all of that name, whatever else it computes."""
    moves: bool = False
    """It takes live requests on with their KV."""


@dataclass(frozen=True)
class PrefillCandidate:
    """A prefill worker as this router sees it now."""

    worker_id: str
    incarnation: str
    grpc_address: str
    kv_address: str
    model_names: tuple[str, ...]
    model_fingerprint: str
    draining: bool
    num_outstanding_tokens: int
    """Prompt tokens that this router expects it to compute and has seen no first token of."""
    max_model_len: int = 0
    """As a decode worker's."""
    numerics: str = ""
    """As a decode worker's."""


@dataclass(frozen=True)
class RoutedRequest:
    """The facts of a request that the choice may depend on."""

    model: str
    num_prompt_tokens: int
    """Those of the output that it resumes included."""
    key: bytes
    """Equal for requests that begin equally."""
    prefixes: Mapping[str, KnownPrefix] = field(default_factory=dict)
    """By model fingerprint."""
    numerics: str = ""
    """Of the worker that it was begun on; those of the same are preferred. Empty: it is new."""
    has_begun: bool = False
    """It has said tokens: where all workers drain, one of them ends it."""
    num_final_tokens: int = 0
    """Of prompt and output at most; 0: not known."""

    def prefix(self, model_fingerprint: str) -> KnownPrefix:
        return self.prefixes.get(model_fingerprint, _UNKNOWN_PREFIX)


_UNKNOWN_PREFIX = KnownPrefix(block_size=1)


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
    """The chosen workers, and what every candidate would have cost. `reason` says in words what decided."""

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
    """Of all that were ready, best first."""
    prefill_terms: tuple[PrefillTerms, ...]
    """Of all that fit the decode worker, best first."""

    @property
    def prefills_locally(self) -> bool:
        return self.prefilled_by.worker_id == self.decode.worker_id

    @property
    def cause(self) -> str:
        """`reason` in one word of a few, for the metric."""
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


@dataclass(frozen=True)
class _Scored:
    """A ready decode worker with its terms and with the prefill workers that fit it, in order."""

    worker: DecodeCandidate
    terms: DecodeTerms
    local: PrefillTerms
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


def choose(
    request: RoutedRequest,
    decode: Sequence[DecodeCandidate],
    prefill: Sequence[PrefillCandidate],
    exclude: Collection[str] = (),
    *,
    policy: Policy = Policy.KV,
    state: PolicyState | None = None,
    cost: CostModel | None = None,
) -> Decision | Refusal:
    """The decode worker and the prefill targets for a request. `exclude`: decode workers that were tried already."""
    connected = _ready(request, decode, exclude)
    if isinstance(connected, Refusal):
        return connected
    ready = prefer_equal(request.numerics, connected)
    cost = cost or CostModel()
    state = state or PolicyState()
    targets = {
        fingerprint: _ordered_prefill(request, fingerprint, prefill, policy, state, cost)
        for fingerprint in {worker.model_fingerprint for worker in ready}
    }
    scored = _best_first(
        [_score_decode(cost, request, worker, targets[worker.model_fingerprint]) for worker in ready],
        request, policy, state, cost.bounded_load_factor, cost.bounded_load_slack_requests,
    )  # fmt: skip
    best = scored[0]
    by = best.local if best.terms.prefills else best.targets[0].terms
    return Decision(
        decode=best.worker,
        prefill=tuple(target.worker for target in best.targets[:MAX_PREFILL_TARGETS]),
        reason=_reason(policy, best, by, len(ready)),
        policy=policy,
        prefilled_by=by,
        sources=useful_sources(cost, request.prefix(best.worker.model_fingerprint), except_worker=by.worker_id),
        decode_terms=tuple(member.terms for member in scored),
        prefill_terms=tuple(target.terms for target in best.targets),
    )


def next_state(state: PolicyState, decision: Decision, known: Collection[str]) -> PolicyState:
    """The state after a decision was carried out. `known`: the workers there are; others are forgotten."""
    if decision.policy is not Policy.ROUND_ROBIN:
        return state
    turn = max(state.last_turn.values(), default=0) + 1
    chosen = [decision.decode.worker_id, *(worker.worker_id for worker in decision.prefill[:1])]
    kept = {worker_id: last for worker_id, last in state.last_turn.items() if worker_id in known}
    return PolicyState(kept | dict.fromkeys(chosen, turn))


def _ready(
    request: RoutedRequest, decode: Sequence[DecodeCandidate], exclude: Collection[str]
) -> list[DecodeCandidate] | Refusal:
    serving = [worker for worker in decode if request.model in worker.model_names]
    if not serving:
        return Refusal.NO_WORKER
    untried = [worker for worker in serving if worker.worker_id not in exclude]
    if not untried:
        return Refusal.ALL_TRIED
    connected = [worker for worker in untried if worker.connected]
    if not connected:
        return Refusal.NOT_CONNECTED
    stay = [worker for worker in connected if not worker.draining]
    if not stay and not request.has_begun:
        return Refusal.DRAINING
    return _long_enough(request, stay or connected) or Refusal.TOO_SHORT


def _long_enough(request: RoutedRequest, workers: Sequence[DecodeCandidate]) -> list[DecodeCandidate]:
    """Who holds it to its end. Else, once it has begun, who holds it for a while: it may end sooner, or go on again."""
    whole = [worker for worker in workers if holds(worker, request.num_final_tokens)]
    if whole or not request.has_begun:
        return whole
    return [worker for worker in workers if holds(worker, request.num_prompt_tokens + 1)]


def holds(worker: DecodeCandidate | PrefillCandidate, num_tokens: int) -> bool:
    """Whether its context holds so many tokens of prompt and output."""
    return not worker.max_model_len or num_tokens <= worker.max_model_len


# ---- prefill workers ----------------------------------------------------------


def _ordered_prefill(
    request: RoutedRequest,
    model_fingerprint: str,
    prefill: Sequence[PrefillCandidate],
    policy: Policy,
    state: PolicyState,
    cost: CostModel,
) -> tuple[_ScoredPrefill, ...]:
    """The prefill workers whose blocks a decode worker of that fingerprint can use, best first."""
    prefix = request.prefix(model_fingerprint)
    # A token more than it says: else it would be the answer's last one there.
    num_tokens = min(request.num_prompt_tokens + 2, request.num_final_tokens or sys.maxsize)
    fitting = [
        _ScoredPrefill(
            worker,
            prefill_terms(cost, worker.worker_id, worker.num_outstanding_tokens, request.num_prompt_tokens, prefix),
        )
        for worker in prefill
        if request.model in worker.model_names
        and worker.model_fingerprint == model_fingerprint
        and not worker.draining
        and holds(worker, num_tokens)
    ]
    factor, slack = cost.bounded_load_factor, cost.bounded_load_slack_tokens
    return tuple(_best_first(fitting, request, policy, state, factor, slack))


# ---- decode workers -----------------------------------------------------------


def _score_decode(
    cost: CostModel, request: RoutedRequest, worker: DecodeCandidate, targets: tuple[_ScoredPrefill, ...]
) -> _Scored:
    prefix = request.prefix(worker.model_fingerprint)
    local = prefill_terms(cost, worker.worker_id, worker.num_waiting_tokens, request.num_prompt_tokens, prefix)
    own = prefix.own(worker.worker_id)
    # What the worker brings into its paged cache before it decides whether to prefill.
    num_missing = max(request.num_prompt_tokens - sum(own.num_per_tier[:2]) * prefix.block_size, 1)
    prefills = worker.colocated or not targets or num_missing <= worker.local_prefill_max_tokens
    num_new_blocks = max(-(-request.num_prompt_tokens // prefix.block_size) - own.num_blocks, 0)
    num_waiting = max(worker.num_outstanding + 1 - worker.max_num_seqs, 0) if worker.max_num_seqs else 0
    use = 1 - worker.num_free_blocks / worker.num_blocks if worker.num_blocks else 0.0
    shortage = max(num_new_blocks - max(worker.num_free_blocks, 0), 0) if worker.num_blocks else 0
    terms = DecodeTerms(
        worker_id=worker.worker_id,
        prefills=prefills,
        prefill=local.total if prefills else targets[0].terms.total,
        handoff=0.0 if prefills else handoff_tokens(cost, num_new_blocks, prefix.block_size),
        running=worker.num_outstanding * cost.request_tokens,
        queued=num_waiting * cost.queued_request_tokens,
        # In steps, so that a few blocks more or less leave a tie a tie.
        kv_use=math.floor(min(max(use, 0.0), 1.0) * 10) / 10 * cost.kv_use_tokens,
        kv_shortage=float(shortage * prefix.block_size),
    )
    return _Scored(worker, terms, local, targets)


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


def _reason(policy: Policy, best: _Scored, by: PrefillTerms, num_ready: int) -> str:
    worker = best.worker
    words = {
        Policy.KV: f"costs {best.terms.total:.0f} tokens, the least",
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


def _tie(key: bytes, worker_id: str) -> bytes:
    # Rendezvous hashing: when a worker leaves, only its own requests move.
    return hashlib.blake2b(key + b"\0" + worker_id.encode(), digest_size=8).digest()
