"""Says whether a model's workers should get another prompt now, or whether it waits better in the router.

A worker that has a moment's work in its queue computes full steps; what is queued there beyond that gains nothing, and
is out of reach of priorities, fairness and second thoughts.
"""

from __future__ import annotations

import math

from services.rates import Rates
from services.router.fleet.workers import Workers
from services.router.routing import DecodeCandidate

# More requests than a decode worker's batch holds: some are still being prefilled, and none of its places stays empty.
_BATCH_FACTOR = 1.125
_BATCH_SLACK = 2


class Headroom:
    """The admission's view of the workers (`services.router.admission.Fleet`)."""

    def __init__(self, workers: Workers, backlog_s: float) -> None:
        """`backlog_s`: prompt work that a worker may have in front, in seconds of its time; 0: as much as there is."""
        self._workers = workers
        self._backlog_s = backlog_s or math.inf

    def has_room(self, model: str, num_pending: int, num_pending_tokens: float) -> bool:
        """Whether a worker should get another sequence now. Where nobody is ready that is not for us to say."""
        ready = self._ready(model)
        if not ready:
            return True
        limit = sum(map(_most_requests, ready))
        if sum(each.num_outstanding for each in ready) + num_pending >= limit:
            return False
        fronts = self._fronts(model, ready)
        # Spread over all, as placing them will.
        front = min(fronts) + num_pending_tokens / len(fronts)
        return front == 0 or self.rates(model).prompt_s(math.ceil(front)) < self._backlog_s

    def num_seats(self, model: str) -> float:
        """Sequences that the batches of the decode workers hold; infinity where one does not say, or none is ready."""
        ready = self._ready(model)
        return sum(each.max_num_seqs or math.inf for each in ready) if ready else math.inf

    def front_tokens(self, model: str) -> float:
        """Prompt tokens in front of a new one at the worker that has fewest."""
        return min(self._fronts(model, self._ready(model)), default=0.0)

    def num_prefilling(self, model: str) -> int:
        """Workers that share the model's prompts; at least 1."""
        return max(len(self._fronts(model, self._ready(model))), 1)

    def rates(self, model: str) -> Rates:
        """Returns how fast they are."""
        fingerprints = [each.model_fingerprint for each in self._workers.records if model in each.model_names]
        return self._workers.rates(fingerprints[0] if fingerprints else "")

    def _ready(self, model: str) -> list[DecodeCandidate]:
        return [
            each
            for each in self._workers.decode_candidates()
            if model in each.model_names and each.connected and not each.draining
        ]

    def _fronts(self, model: str, ready: list[DecodeCandidate]) -> list[int]:
        """Prompt tokens in front at each worker that prefills: prefill workers, and decode workers that do without."""
        fronts = [
            each.num_outstanding_tokens
            for each in self._workers.prefill_candidates()
            if model in each.model_names and not each.draining
        ]
        return fronts + [each.num_waiting_tokens for each in ready if each.colocated or not fronts]


def _most_requests(worker: DecodeCandidate) -> float:
    return _BATCH_FACTOR * worker.max_num_seqs + _BATCH_SLACK if worker.max_num_seqs else math.inf
