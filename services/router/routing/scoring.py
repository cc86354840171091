"""Computes what a request costs at all workers of a table, column by column: the formulas of cost.py, the same to the
last bit for each. Workers differ by their row, and by which of the prompt's blocks they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from services.router.routing.candidates import RoutedRequest
from services.router.routing.cost import (
    NOTHING,
    CostModel,
    DecodeTerms,
    Held,
    KnownPrefix,
    PrefillTerms,
    PrefillWork,
    handoff_tokens,
    prefill_work,
)
from services.router.routing.tables import Column, DecodeTable, PrefillTable, Rows


class Works:
    """What a request's prompt is at workers of one fingerprint, by the blocks that they have."""

    def __init__(self, cost: CostModel, request: RoutedRequest, model_fingerprint: str) -> None:
        self.prefix = request.prefix(model_fingerprint)
        self._cost = cost
        self._num_tokens = request.num_prompt_tokens
        self._known: dict[Held, PrefillWork] = {}

    def of(self, own: Held) -> PrefillWork:
        work = self._known.get(own)
        if work is None:
            work = self._known[own] = prefill_work(self._cost, own, self._num_tokens, self.prefix)
        return work

    def at(self, worker_id: str, num_queued_tokens: int) -> PrefillTerms:
        """The terms of one worker."""
        return self.of(self.prefix.own(worker_id)).at(worker_id, num_queued_tokens)


@dataclass(frozen=True)
class _Owned:
    """Which of a prompt's blocks the workers of some rows have: of few kinds, by far most of them none."""

    kinds: Sequence[Held]
    kind_of: Column | None
    """Of each row, by its place in `kinds`; None: all are of the first."""

    @classmethod
    def of(cls, table: PrefillTable | DecodeTable, rows: Rows, prefix: KnownPrefix) -> _Owned:
        places, kinds = list[int](), {NOTHING: 0}
        kind_of = list[int]()
        for worker_id in {*prefix.held, *prefix.expected}:
            for row in table.rows_of((worker_id,)):
                places.append(row)
                kind_of.append(kinds.setdefault(prefix.own(worker_id), len(kinds)))
        if not places:
            return cls([NOTHING], None)
        of_all = np.zeros(len(table.workers), np.intp)
        of_all[places] = kind_of
        return cls(list(kinds), of_all[rows])

    def column(self, values: Sequence[float]) -> Column | float:
        """Of each row that of its kind."""
        return values[0] if self.kind_of is None else np.array(values)[self.kind_of]


def prefill_totals(works: Works, table: PrefillTable | DecodeTable, rows: Rows, queued: Column) -> Column:
    """`PrefillTerms.total` of each row, with so many tokens in front."""
    owned = _Owned.of(table, rows, works.prefix)
    return _totals(owned, [works.of(own) for own in owned.kinds], queued)


def _totals(owned: _Owned, work: Sequence[PrefillWork], queued: Column) -> Column:
    load, fetch, compute = (
        owned.column(column) for column in zip(*((w.load, w.fetch, w.compute) for w in work), strict=True)
    )
    return queued + load + fetch + compute


@dataclass(frozen=True)
class DecodeCosts:
    """`DecodeTerms` of some rows, as columns."""

    rows: Rows
    prefills: Column
    prefill: Column
    handoff: Column
    running: Column
    queued: Column
    kv_use: Column
    kv_shortage: Column

    @property
    def total(self) -> Column:
        return self.prefill + self.handoff + self.running + self.queued + self.kv_use + self.kv_shortage

    def terms(self, table: DecodeTable, place: int) -> DecodeTerms:
        """Those of one row."""
        columns = (getattr(self, each.name)[place].item() for each in fields(self)[1:])
        return DecodeTerms(table.workers[self.rows[place]].worker_id, *columns)

    @classmethod
    def joined(cls, parts: Sequence[DecodeCosts]) -> DecodeCosts:
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))


def decode_costs(
    cost: CostModel,
    request: RoutedRequest,
    works: Works,
    table: DecodeTable,
    rows: Rows,
    best_prefill: PrefillTerms | None,
) -> DecodeCosts:
    """Of rows of one fingerprint. `best_prefill`: of the prefill worker that is likeliest; None: there is none."""
    columns = {name: column[rows] for name, column in table.columns.items()}
    outstanding, num_blocks, num_free = (columns[name] for name in ("num_outstanding", "num_blocks", "num_free_blocks"))
    prefix, num_tokens = works.prefix, request.num_prompt_tokens
    owned = _Owned.of(table, rows, prefix)
    # What the worker brings into its paged cache before it decides whether to prefill.
    at_hand = [sum(own.num_per_tier[:2]) * prefix.block_size for own in owned.kinds]
    num_missing = owned.column([max(num_tokens - num_cached, 1) for num_cached in at_hand])
    num_new_blocks = [max(-(-num_tokens // prefix.block_size) - own.num_blocks, 0) for own in owned.kinds]
    local_total = _totals(owned, [works.of(own) for own in owned.kinds], columns["num_waiting_tokens"])
    if best_prefill is None:
        prefills, prefill, handoff = np.ones(len(rows), np.bool_), local_total, np.zeros(len(rows))
    else:
        prefills = (
            columns["colocated"] | columns["is_prefill_first"] | (num_missing <= columns["local_prefill_max_tokens"])
        )
        prefill = np.where(prefills, local_total, best_prefill.total)
        reads = owned.column([handoff_tokens(cost, count, prefix.block_size) for count in num_new_blocks])
        handoff = np.where(prefills, 0.0, reads)
    is_known, num_seqs = num_blocks > 0, columns["max_num_seqs"]
    waiting = np.where(num_seqs > 0, np.maximum(outstanding + 1 - num_seqs, 0), 0)
    use = np.where(is_known, 1 - num_free / np.maximum(num_blocks, 1), 0.0)
    shortage = np.where(is_known, np.maximum(owned.column(num_new_blocks) - np.maximum(num_free, 0), 0), 0)
    return DecodeCosts(
        rows=rows,
        prefills=prefills,
        prefill=prefill,
        handoff=handoff,
        running=outstanding * cost.request_tokens,
        queued=waiting * cost.queued_request_tokens,
        # In steps, so that a few blocks more or less leave a tie a tie.
        kv_use=np.floor(np.minimum(np.maximum(use, 0.0), 1.0) * 10) / 10 * cost.kv_use_tokens,
        kv_shortage=(shortage * prefix.block_size).astype(np.float64),
    )
