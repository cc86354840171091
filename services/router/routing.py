"""Which workers serve a request: a pure function of a snapshot. No clock, no I/O, no state of its own.

The decode worker is the one with the least work in front of it; the prefill workers are put in order, best first, and
the decode worker takes the first that it can reach. Ties are broken by a hash of (the request's key, the worker), so
equal prompts tend to meet at the same worker, where their prefix is cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

MAX_PREFILL_TARGETS = 3


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
    """Prompt tokens that the worker has not computed yet."""


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
    """Prompt tokens that this router has ordered there and has seen no first token of."""


@dataclass(frozen=True)
class RoutedRequest:
    """What the choice may depend on."""

    model: str
    num_prompt_tokens: int
    key: bytes
    """Equal for requests that begin equally."""


class Refusal(Enum):
    """Why no decode worker was chosen. The value is the metric label."""

    NO_WORKER = "no_worker"  # none is registered for the model
    NOT_CONNECTED = "not_connected"
    DRAINING = "draining"
    ALL_TRIED = "all_tried"


@dataclass(frozen=True)
class Decision:
    """The chosen workers. `reason` says in words what decided."""

    decode: DecodeCandidate
    prefill: tuple[PrefillCandidate, ...]
    reason: str


def choose(
    request: RoutedRequest,
    decode: Sequence[DecodeCandidate],
    prefill: Sequence[PrefillCandidate],
    exclude: Collection[str] = (),
) -> Decision | Refusal:
    """The decode worker and the prefill targets for a request. `exclude`: decode workers that were tried already."""
    serving = [worker for worker in decode if request.model in worker.model_names]
    if not serving:
        return Refusal.NO_WORKER
    untried = [worker for worker in serving if worker.worker_id not in exclude]
    if not untried:
        return Refusal.ALL_TRIED
    connected = [worker for worker in untried if worker.connected]
    if not connected:
        return Refusal.NOT_CONNECTED
    ready = [worker for worker in connected if not worker.draining]
    if not ready:
        return Refusal.DRAINING
    best = min(ready, key=lambda worker: (worker.num_outstanding, _tie(request.key, worker.worker_id)))
    targets = order_prefill(request, best.model_fingerprint, prefill)
    reason = (
        f"{best.worker_id} has {best.num_outstanding} requests, the least of {len(ready)} ready workers"
        f" ({len(serving)} serve the model)"
    )
    return Decision(best, targets, reason)


def order_prefill(
    request: RoutedRequest, model_fingerprint: str, prefill: Sequence[PrefillCandidate]
) -> tuple[PrefillCandidate, ...]:
    """The prefill workers whose blocks the decode worker can use, the least loaded first, three at most."""
    fitting = [
        worker
        for worker in prefill
        if request.model in worker.model_names and worker.model_fingerprint == model_fingerprint and not worker.draining
    ]
    fitting.sort(key=lambda worker: (worker.num_outstanding_tokens, _tie(request.key, worker.worker_id)))
    return tuple(fitting[:MAX_PREFILL_TARGETS])


def _tie(key: bytes, worker_id: str) -> bytes:
    # Rendezvous hashing: when a worker leaves, only its own requests move.
    return hashlib.blake2b(key + b"\0" + worker_id.encode(), digest_size=8).digest()
