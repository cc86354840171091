"""Describes what the choice is made of: the workers as this router sees them now, and the request."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from services.budgets import UNLIMITED, Objectives, Role
from services.router.routing.cost import KnownPrefix


@dataclass(frozen=True)
class Bending:
    """What an elastic worker may do beside what it is given first; it stands among prefill and decode workers, both
    times with this. The defaults are a fixed worker's."""

    role: Role | None = None
    """Which work it is given first now; None: it was fixed."""
    tpot_budget_s: float = math.inf
    """Seconds that a step of it with running streams may take."""
    prompt_budget: int = UNLIMITED
    """Prompt tokens that such a step may carry."""
    num_running: int = 0
    """Streams, as last reported."""
    num_context_tokens: int = 0
    """Over these."""
    num_waiting_tokens: int = 0
    """Of prompts not computed yet, as last reported: what was sent since is not in it, what was computed is not
    either."""

    @property
    def is_elastic(self) -> bool:
        return self.role is not None

    @property
    def is_prefill_first(self) -> bool:
        return self.role == "prefill"


FIXED = Bending()
NO_OBJECTIVES = Objectives()


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
    adapters: tuple[str, ...] = ()
    """The keys of those that it has."""
    is_suspect: bool = False
    """It should have said something by now: it is passed over while others of its model have."""
    bending: Bending = FIXED


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
    """Prompt tokens that this router expects it to compute and has seen no first token of; of an elastic worker what it
    last reported, where that is more."""
    max_model_len: int = 0
    """As a decode worker's."""
    numerics: str = ""
    """As a decode worker's."""
    adapters: tuple[str, ...] = ()
    """As a decode worker's."""
    bending: Bending = FIXED


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
    adapter: str = ""
    """The key of the adapter that its workers must have; empty: none."""
    fingerprints: Collection[str] | None = None
    """Of the model's weights: of those that it may go to; None: any."""
    objectives: Objectives = NO_OBJECTIVES
    """What its client is to get; of the time to the first token, what is left of it now."""
    num_output_tokens: float = 0.0
    """Expected of its answer, from now on."""

    def prefix(self, model_fingerprint: str) -> KnownPrefix:
        return self.prefixes.get(model_fingerprint, NO_PREFIX)


NO_PREFIX = KnownPrefix(block_size=1)


def holds(worker: DecodeCandidate | PrefillCandidate, num_tokens: int) -> bool:
    """Whether its context holds so many tokens of prompt and output."""
    return not worker.max_model_len or num_tokens <= worker.max_model_len
