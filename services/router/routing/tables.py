"""Keeps the candidates of each kind in columns, so that a choice among a thousand costs little more than among ten.

A worker's row is written anew when there is news of it, not with each request. A request looks at columns, which takes
nanoseconds a worker, and at objects for those few alone that come first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.budgets import UNLIMITED, Role
from services.router.routing.candidates import FIXED, DecodeCandidate, PrefillCandidate

C = TypeVar("C", DecodeCandidate, PrefillCandidate)

Column: TypeAlias = NDArray[Any]
Rows: TypeAlias = NDArray[np.intp]

_UNBOUNDED = np.iinfo(np.int64).max
_NO_ROWS = np.empty(0, np.intp)
BENDING = {
    "is_prefill_first": False, "tpot_budget_s": np.inf, "prompt_budget": UNLIMITED, "num_running": 0,
    "num_context_tokens": 0,
}  # fmt: skip
"""Columns of `Bending`, and what a fixed worker has in them: its rows are never written."""


class _Table(Generic[C]):
    """Rows of workers. Who there is, and what each serves, stays: `put` brings what changes otherwise."""

    _BOOLS: tuple[str, ...] = ("draining",)
    _NUMBERS: tuple[str, ...] = ("max_model_len",)
    """Fields that are columns. As one, a context whose length is not known has no end."""

    def __init__(self, workers: Sequence[C]) -> None:
        self.workers: list[C] = list(workers)
        self.version = 0
        """Another one after each `put`."""
        self.columns: dict[str, Column] = {name: np.zeros(len(workers), np.int64) for name in self._NUMBERS}
        self.columns |= {name: np.zeros(len(workers), np.bool_) for name in self._BOOLS}
        self.columns |= {name: np.full(len(workers), value) for name, value in BENDING.items()}
        self.is_elastic = np.array([worker.bending.is_elastic for worker in workers], np.bool_)
        self.has_elastic = bool(self.is_elastic.any())
        self.names_in_use = [name for name in self.columns if self.has_elastic or name not in BENDING]
        """Of the columns: those of bending are all alike where nobody is elastic."""
        self.fingerprints = sorted({worker.model_fingerprint for worker in workers})
        numbers = {fingerprint: number for number, fingerprint in enumerate(self.fingerprints)}
        self.fingerprint = np.array([numbers[worker.model_fingerprint] for worker in workers], np.int64)
        """Of each row, by its place in `fingerprints`."""
        self._words = np.array([word(worker.worker_id.encode()) for worker in workers], np.uint64)
        self._rows_of: dict[str, list[int]] = {}
        for row, worker in enumerate(workers):
            self._rows_of.setdefault(worker.worker_id, []).append(row)
            self._write(row, worker)
        self._by_name = np.empty(len(workers), np.uint64)
        self._by_name[sorted(range(len(workers)), key=lambda row: workers[row].worker_id)] = np.arange(len(workers))
        self._groups: dict[tuple[str, str], Mapping[str, Rows]] = {}

    def put(self, row: int, worker: C) -> None:
        """There is news of a row's worker."""
        self.workers[row] = worker
        self._write(row, worker)
        self.version += 1

    def _write(self, row: int, worker: C) -> None:
        for name in (*self._NUMBERS, *self._BOOLS):
            self.columns[name][row] = getattr(worker, name)
        if not worker.max_model_len:
            self.columns["max_model_len"][row] = _UNBOUNDED
        if worker.bending is not FIXED:
            for name in BENDING:
                self.columns[name][row] = getattr(worker.bending, name)

    def by_role(self, rows: Rows, role: Role) -> Rows:
        """Those of the rows that are given such work first: fixed ones, and elastic ones with that role now."""
        if not self.has_elastic:
            return rows
        wanted: Rows = rows[~self.is_elastic[rows] | (self.columns["is_prefill_first"][rows] == (role == "prefill"))]
        return wanted

    def groups(self, model: str, adapter: str = "") -> Mapping[str, Rows]:
        """The rows that serve the model, and have the adapter of that key if it is not empty, by fingerprint."""
        found = self._groups.get((model, adapter))
        if found is None:
            rows: dict[str, list[int]] = {}
            for row, worker in enumerate(self.workers):
                if model in worker.model_names and (not adapter or adapter in worker.adapters):
                    rows.setdefault(worker.model_fingerprint, []).append(row)
            found = {fingerprint: np.array(members, np.intp) for fingerprint, members in rows.items()}
            if found:  # of what nobody serves there is no end
                self._groups[model, adapter] = found
        return found

    def serving(self, model: str, adapter: str = "", fingerprints: Collection[str] | None = None) -> Rows:
        """The rows of all these fingerprints; None: of any."""
        groups = self.groups(model, adapter)
        wanted = [rows for each, rows in groups.items() if fingerprints is None or each in fingerprints]
        if len(wanted) == 1:
            return wanted[0]
        return np.concatenate(wanted) if wanted else _NO_ROWS

    def by_fingerprint(self, rows: Rows) -> list[tuple[str, Rows]]:
        """The rows of each fingerprint among them."""
        if len(self.fingerprints) == 1:
            return [(self.fingerprints[0], rows)]
        numbers = self.fingerprint[rows]
        return [(self.fingerprints[number], rows[numbers == number]) for number in np.unique(numbers)]

    def rows_of(self, worker_ids: Collection[str]) -> list[int]:
        """The rows of those that are there."""
        return [row for worker_id in worker_ids for row in self._rows_of.get(worker_id, ())]

    def ties(self, key: bytes, rows: Rows) -> Column:
        """A rank of each worker for a request's key, by rendezvous hashing: when one leaves, only its own move."""
        return mixed(self._words[rows] ^ np.uint64(word(key)))

    def names(self, rows: Rows) -> Column:
        """Each worker's rank by its id."""
        return self._by_name[rows]


class PrefillTable(_Table[PrefillCandidate]):
    """The prefill workers."""

    _NUMBERS = ("max_model_len", "num_outstanding_tokens")

    def ready(self, model: str) -> Rows:
        """Those that a new prompt for the model could be given to."""
        rows = self.serving(model)
        return rows[~self.columns["draining"][rows]]


class DecodeTable(_Table[DecodeCandidate]):
    """The decode workers."""

    _BOOLS = ("draining", "connected", "is_suspect", "colocated")
    _NUMBERS = (
        "max_model_len", "num_outstanding", "num_waiting_tokens", "max_num_seqs", "num_blocks", "num_free_blocks",
        "local_prefill_max_tokens",
    )  # fmt: skip

    def reachable(self, rows: Rows) -> Rows:
        """Those of the rows that are connected; who should have said something by now is passed over while another
        worker of its fingerprint has."""
        connected, suspect = self.columns["connected"], self.columns["is_suspect"]
        rows = rows[connected[rows]]
        if not suspect[rows].any():
            return rows
        heard = self.fingerprint[connected & ~suspect]
        return rows[~(suspect[rows] & np.isin(self.fingerprint[rows], heard))]

    def ready(self, model: str, adapter: str = "") -> Rows:
        """Those that a new request for the model could be given to."""
        rows = self.reachable(self.serving(model, adapter))
        return rows[~self.columns["draining"][rows]]


Table: TypeAlias = PrefillTable | DecodeTable


def word(name: bytes) -> int:
    """64 bits of it."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each as another one, without a pattern: the last steps of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def first(primary: Column, tie: Column, count: int) -> Rows:
    """The places of the `count` least pairs, in order. Sorts those few alone."""
    if len(primary) <= count:
        return np.lexsort((tie, primary))
    limit = np.partition(primary, count - 1)[count - 1]
    least, equal = np.flatnonzero(primary < limit), np.flatnonzero(primary == limit)
    num_wanted = count - len(least)
    if len(equal) > num_wanted:
        equal = equal[np.argpartition(tie[equal], num_wanted - 1)[:num_wanted]]
    near = np.concatenate((least, equal))
    return near[np.lexsort((tie[near], primary[near]))]
