"""Says whether a model's workers should get another prompt now, or whether it waits better in the router.

A worker that has a moment's work in its queue computes full steps; what is queued there beyond that gains nothing, and
is out of reach of priorities, fairness and second thoughts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.rates import Rates
from services.router.routing import DecodeTable, PrefillTable

# More requests than a decode worker's batch holds: some are still being prefilled, and none of its places stays empty.
_BATCH_FACTOR = 1.125
_BATCH_SLACK = 2


class Tables(Protocol):
    """Who knows the workers: `Workers`, and whoever simulates a fleet."""

    def decode_table(self) -> DecodeTable:
        """The decode workers as they are now."""

    def prefill_table(self) -> PrefillTable:
        """The prefill workers as they are now."""

    def rates(self, model_fingerprint: str) -> Rates:
        """How fast the workers are that compute this model's prompts."""

    def fingerprint(self, model: str) -> str:
        """That of a worker that serves the model; empty where none does."""


class Headroom:
    """The admission's view of the workers (`services.router.admission.Fleet`)."""

    def __init__(self, workers: Tables, backlog_s: float, bends: bool = False) -> None:
        """`backlog_s`: prompt work that a worker may have in front, in seconds of its time; 0: as much as there is.
        `bends`: elastic workers do not only what they are given first, since there are objectives."""
        self._workers = workers
        self._backlog_s = backlog_s or math.inf
        self._bends = bends
        self._state: tuple[DecodeTable, int, PrefillTable, int] | None = None
        self._rooms: dict[str, _Room] = {}  # by model, in this state

    def has_room(self, model: str, num_pending: int, num_pending_tokens: float) -> bool:
        """Whether a worker should get another sequence now. Where nobody is ready that is not for us to say."""
        room = self._room(model)
        if not room.num_ready:
            return True
        if room.num_outstanding + num_pending >= _BATCH_FACTOR * room.num_seats + _BATCH_SLACK * room.num_ready:
            return False
        # Spread over all, as placing them will.
        front = room.front_tokens + num_pending_tokens / room.num_prefilling
        return front == 0 or self.rates(model).prompt_s(math.ceil(front)) < self._backlog_s

    def num_seats(self, model: str) -> float:
        """Sequences that the batches of the decode workers hold; infinity where one does not say, or none is ready."""
        return self._room(model).num_seats

    def front_tokens(self, model: str) -> float:
        """Prompt tokens in front of a new one at the worker that has fewest."""
        return self._room(model).front_tokens

    def num_prefilling(self, model: str) -> int:
        """Workers that share the model's prompts; at least 1."""
        return self._room(model).num_prefilling

    def rates(self, model: str) -> Rates:
        """Returns how fast they are."""
        return self._workers.rates(self._workers.fingerprint(model))

    def _room(self, model: str) -> _Room:
        decode, prefill = self._workers.decode_table(), self._workers.prefill_table()
        state = (decode, decode.version, prefill, prefill.version)
        if state != self._state:  # asked several times for each request
            self._state = state
            self._rooms.clear()
        if model not in self._rooms:
            self._rooms[model] = _Room.of(model, decode, prefill, self._bends)
        return self._rooms[model]


@dataclass(frozen=True)
class _Room:
    """What the workers of a model have to do."""

    num_ready: int
    """Decode workers."""
    num_outstanding: int
    num_seats: float
    front_tokens: int
    num_prefilling: int

    @classmethod
    def of(cls, model: str, decode: DecodeTable, prefill: PrefillTable, bends: bool) -> _Room:
        ready, prefilling, columns = decode.ready(model), prefill.ready(model), decode.columns
        if not bends:
            prefilling = prefill.by_role(prefilling, "prefill")
            by_role = decode.by_role(ready, "decode")
            ready = by_role if len(by_role) else ready
        # Prompt tokens in front at each worker that prefills: prefill workers, and decode workers that do without.
        fronts = prefill.columns["num_outstanding_tokens"][prefilling]
        own = ready[columns["colocated"][ready] & ~decode.is_elastic[ready]] if len(fronts) else ready
        fronts = np.concatenate((fronts, columns["num_waiting_tokens"][own]))
        num_seqs = columns["max_num_seqs"][ready]
        return cls(
            num_ready=len(ready),
            num_outstanding=int(columns["num_outstanding"][ready].sum()),
            num_seats=int(num_seqs.sum()) if len(ready) and num_seqs.all() else math.inf,
            front_tokens=int(fronts.min()) if len(fronts) else 0,
            num_prefilling=max(len(fronts), 1),
        )
