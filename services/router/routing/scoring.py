"""Computes what a request costs at all workers of a table, column by column: the formulas of cost.py, the same to the
last bit for each. Workers differ by their row, and by which of the prompt's blocks they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from services.router.routing.bending import Bend, PromptPart
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
from services.router.routing.tables import BENDING, Column, DecodeTable, PrefillTable, Rows


class Works:
    """What a request's prompt is at workers of one fingerprint, by the blocks that they have."""

    def __init__(self, cost: CostModel, request: RoutedRequest, model_fingerprint: str) -> None:
        self.prefix = request.prefix(model_fingerprint)
        self._cost = cost
        self.num_tokens = request.num_prompt_tokens
        self._known: dict[Held, PrefillWork] = {}

    def of(self, own: Held) -> PrefillWork:
        work = self._known.get(own)
        if work is None:
            work = self._known[own] = prefill_work(self._cost, own, self.num_tokens, self.prefix)
        return work

    def prompt_s(self, work: PrefillWork) -> float:
        """The seconds of what is computed, on top of steps' base."""
        return self._cost.rates.prompt_s(work.num_computed_tokens, self.num_tokens - work.num_computed_tokens)

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


@dataclass(frozen=True)
class PrefillCosts:
    """`PrefillTerms` of some rows, as columns."""

    work: Column
    bent: BentPrefill | None = None

    @property
    def total(self) -> Column:
        return self.work if self.bent is None else self.work + self.bent.late

    def terms(self, terms: PrefillTerms, place: int) -> PrefillTerms:
        """Those of one row: what its prompt is there, and what bending adds."""
        return terms if self.bent is None else self.bent.added(terms, place)


@dataclass(frozen=True)
class BentPrefill:
    """What bending adds to `PrefillTerms`, as columns."""

    beside: Column
    late: Column
    expected_s: Column

    def added(self, terms: PrefillTerms, place: int) -> PrefillTerms:
        beside, late, expected_s = (column[place].item() for column in (self.beside, self.late, self.expected_s))
        return replace(terms, beside=beside, late=late, expected_s=expected_s)


def prefill_costs(
    works: Works, table: PrefillTable | DecodeTable, rows: Rows, queued: Column, bend: Bend | None = None
) -> PrefillCosts:
    """Of each row, with so many tokens in front."""
    owned = _Owned.of(table, rows, works.prefix)
    return _prefill_costs(works, owned, table, rows, queued, bend)


def _prefill_costs(
    works: Works, owned: _Owned, table: PrefillTable | DecodeTable, rows: Rows, queued: Column, bend: Bend | None
) -> PrefillCosts:
    kinds = [works.of(own) for own in owned.kinds]
    load, fetch, compute = (
        owned.column(column) for column in zip(*((w.load, w.fetch, w.compute) for w in kinds), strict=True)
    )
    work = queued + load + fetch + compute
    if bend is None:
        return PrefillCosts(work)
    columns = {name: table.columns[name][rows] for name in BENDING}
    expected_s, steps_s = bend.expected_s(columns, queued, _part(works, owned, kinds))
    beside = bend.beside(steps_s)
    return PrefillCosts(work + beside, BentPrefill(beside, bend.late(expected_s), expected_s))


def _part(works: Works, owned: _Owned, kinds: Sequence[PrefillWork]) -> PromptPart:
    num_computed, prompt_s = [work.num_computed_tokens for work in kinds], list(map(works.prompt_s, kinds))
    middle = [works.num_tokens - count + count // 2 for count in num_computed]
    moved = [work.load + work.fetch for work in kinds]
    return PromptPart(*(owned.column(values) for values in (num_computed, middle, prompt_s, moved)))


@dataclass(frozen=True)
class BentCosts:
    """What bending adds to `DecodeTerms`, as columns."""

    late: Column
    stall: Column
    occupied: Column
    expected_s: Column
    via_s: Column
    """Seconds until the first token, were the prompt computed by the best prefill worker; infinite: there is none."""
    local: BentPrefill
    """Were it computed by this worker."""

    @classmethod
    def joined(cls, parts: Sequence[BentCosts]) -> BentCosts:
        names = ("late", "stall", "occupied", "expected_s", "via_s")
        columns = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        local = (np.concatenate([getattr(part.local, each.name) for part in parts]) for each in fields(BentPrefill))
        late, stall, occupied, expected_s, via_s = columns
        return cls(late, stall, occupied, expected_s, via_s, BentPrefill(*local))


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
    bent: BentCosts | None = None

    @property
    def total(self) -> Column:
        by_load = self.prefill + self.handoff + self.running + self.queued + self.kv_use + self.kv_shortage
        return by_load if self.bent is None else by_load + self.bent.late + self.bent.stall + self.bent.occupied

    def terms(self, table: DecodeTable, place: int) -> DecodeTerms:
        """Those of one row."""
        columns = [getattr(self, name)[place].item() for name in _COLUMNS[1:]]
        if self.bent is not None:
            bent = (self.bent.late, self.bent.stall, self.bent.occupied, self.bent.expected_s)
            columns += [column[place].item() for column in bent]
        return DecodeTerms(table.workers[self.rows[place]].worker_id, *columns)

    @classmethod
    def joined(cls, parts: Sequence[DecodeCosts]) -> DecodeCosts:
        if len(parts) == 1:
            return parts[0]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
        bent = [part.bent for part in parts if part.bent is not None]
        return cls(**columns, bent=BentCosts.joined(bent) if bent else None)


_COLUMNS = [each.name for each in fields(DecodeCosts) if each.name != "bent"]


def decode_costs(
    cost: CostModel,
    request: RoutedRequest,
    works: Works,
    table: DecodeTable,
    rows: Rows,
    best_prefill: PrefillTerms | None,
    bend: Bend | None = None,
) -> DecodeCosts:
    """Of rows of one fingerprint. `best_prefill`: of the prefill worker that is likeliest; None: there is none."""
    columns = {name: table.columns[name][rows] for name in table.names_in_use}
    outstanding, num_blocks, num_free = (columns[name] for name in ("num_outstanding", "num_blocks", "num_free_blocks"))
    prefix, num_tokens = works.prefix, request.num_prompt_tokens
    owned = _Owned.of(table, rows, prefix)
    # What the worker brings into its paged cache before it decides whether to prefill.
    at_hand = [sum(own.num_per_tier[:2]) * prefix.block_size for own in owned.kinds]
    num_missing = owned.column([max(num_tokens - num_cached, 1) for num_cached in at_hand])
    num_new_blocks = [max(-(-num_tokens // prefix.block_size) - own.num_blocks, 0) for own in owned.kinds]
    local = _prefill_costs(works, owned, table, rows, columns["num_waiting_tokens"], bend)
    if best_prefill is None:
        prefills, prefill, handoff = np.ones(len(rows), np.bool_), local.work, np.zeros(len(rows))
        via_s: Column = np.full(len(rows), np.inf)
    else:
        prefills = columns["colocated"] | (num_missing <= columns["local_prefill_max_tokens"])
        if table.has_elastic:
            prefills |= columns["is_prefill_first"]
        reads = owned.column([handoff_tokens(cost, count, prefix.block_size) for count in num_new_blocks])
        via_s = np.full(len(rows), best_prefill.expected_s) + reads * cost.rates.prompt_token_s
        if bend is not None and local.bent is not None:
            prefills = prefills | (table.is_elastic[rows] & bend.deflects(via_s, local.bent.expected_s))
        prefill = np.where(prefills, local.work, best_prefill.work)
        handoff = np.where(prefills, 0.0, reads)
    bent = None
    if bend is not None and local.bent is not None:
        expected_s = np.where(prefills, local.bent.expected_s, via_s)
        bent = BentCosts(
            late=bend.late(expected_s),
            stall=bend.stall(columns, outstanding, num_tokens),
            occupied=bend.occupied(columns, num_tokens),
            expected_s=expected_s,
            via_s=via_s,
            local=local.bent,
        )
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
        bent=bent,
    )
