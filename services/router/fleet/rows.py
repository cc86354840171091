"""Describes a worker as the choice sees it: its record, what its session last said, and what this router gave it."""

from __future__ import annotations

from kvstore.registry import WorkerRecord
from services.orders import MOVES
from services.router.fleet.session import WorkerSession
from services.router.routing import FIXED, Bending, DecodeCandidate, PrefillCandidate


def decode_candidate(record: WorkerRecord, session: WorkerSession, num_queued_tokens: int) -> DecodeCandidate:
    """`num_queued_tokens`: of prompts that this router expects it to compute."""
    return DecodeCandidate(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        model_names=record.model_names,
        model_fingerprint=record.model_fingerprint,
        connected=session.connected,
        draining=record.draining or session.load.draining,
        num_outstanding=session.num_outstanding,
        num_waiting_tokens=max(session.load.num_waiting_tokens, num_queued_tokens),
        max_num_seqs=record.max_num_seqs,
        num_blocks=session.load.num_blocks,
        num_free_blocks=session.num_free_blocks,
        colocated=record.colocated,
        local_prefill_max_tokens=record.local_prefill_max_tokens,
        is_simulation=record.is_simulation,
        max_model_len=record.max_model_len,
        numerics=record.numerics,
        is_exact=record.is_exact,
        moves=MOVES in session.features,
        adapters=record.adapters,
        is_suspect=session.is_suspect,
        bending=_bending(record, session),
    )


def prefill_candidate(record: WorkerRecord, session: WorkerSession | None, num_queued_tokens: int) -> PrefillCandidate:
    """`session`: of an elastic worker, which says by it what all routers gave it, and whether it is there. One that
    should have said something by now gets no prompt: who decodes may compute it, too."""
    is_away = session is not None and (session.load.draining or not session.connected or session.is_suspect)
    num_waiting_tokens = 0 if session is None else session.load.num_waiting_tokens
    return PrefillCandidate(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        grpc_address=record.grpc_address,
        kv_address=record.kv_address,
        model_names=record.model_names,
        model_fingerprint=record.model_fingerprint,
        draining=record.draining or is_away,
        num_outstanding_tokens=max(num_waiting_tokens, num_queued_tokens),
        max_model_len=record.max_model_len,
        numerics=record.numerics,
        adapters=record.adapters,
        bending=FIXED if session is None else _bending(record, session),
    )


def _bending(record: WorkerRecord, session: WorkerSession) -> Bending:
    if not (record.prefills and record.decodes):
        return FIXED
    budgets, load = session.budgets, session.load
    # Requests whose prompts are computed run, too, and are no streams yet: those have a context.
    num_streams = load.num_running if load.num_context_tokens else 0
    return Bending(
        session.role,
        budgets.tpot_s,
        budgets.prompt_tokens,
        num_streams,
        load.num_context_tokens,
        load.num_waiting_tokens,
    )
