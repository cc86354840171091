"""Makes the controller's view of a fleet, of what workers and routers have said."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean

from kvstore.registry import WorkerRecord
from services.budgets import UNBOUND
from services.orders import BUDGETS
from services.rates import GUESSED, StepShape, mean_rates
from services.router.fleet import Workers, WorkerSession
from services.router.roles.ledger import Tally, attainment_of, demand_of
from services.router.roles.measurements import FleetView, WorkerView


def fleet_view(workers: Workers, model_fingerprint: str, tally: Tally, now_s: float) -> FleetView:
    """The fleet of a model now; `tally`: of all routers."""
    views = tuple(
        _worker_view(record, workers)
        for record in workers.records
        if record.model_fingerprint == model_fingerprint and (record.prefills or record.decodes)
    )
    prefill = [each for each in views if each.is_ready and each.role == "prefill"]
    decode = [each for each in views if each.is_ready and each.role == "decode" and each.num_running]
    rates = workers.rates(model_fingerprint)
    waiting = [each.num_waiting_tokens + tally.num_queued_tokens / len(prefill) for each in prefill]
    return FleetView(
        now_s,
        model_fingerprint,
        views,
        attainment_of(tally),
        demand_of(tally),
        rates.prompt_s(math.ceil(fmean(waiting or [0]))),
        max((_step_s(each, decode) for each in decode), default=0.0),
    )


def _step_s(worker: WorkerView, decode: Iterable[WorkerView]) -> float:
    rates = worker.rates if worker.rates.num_steps else mean_rates([each.rates for each in decode])
    return rates.step_s(StepShape(num_running=worker.num_running, num_context_tokens=worker.num_context_tokens))


def _worker_view(record: WorkerRecord, workers: Workers) -> WorkerView:
    is_elastic, session = record.prefills and record.decodes, workers.session_of(record)
    queued = workers.num_queued_tokens(record)
    if session is None:
        # A prefill worker is there as long as it is registered; another one without a session is not reached.
        return WorkerView(
            record.worker_id,
            record.incarnation,
            "prefill" if record.prefills else "decode",
            UNBOUND,
            is_fixed=not is_elastic,
            is_ready=not record.decodes and not record.draining and not record.phase,
            age_s=0.0,
            num_running=0,
            num_context_tokens=0,
            num_waiting_tokens=queued,
            max_running=record.max_num_seqs,
            num_kv_tokens=record.num_blocks * record.block_size,
            kv_usage=0.0,
            rates=workers.rates_of(record),
        )
    return _with_session(record, session, queued, is_elastic)


def _with_session(record: WorkerRecord, session: WorkerSession, num_queued_tokens: int, is_elastic: bool) -> WorkerView:
    load = session.load
    return WorkerView(
        record.worker_id,
        record.incarnation,
        session.role if is_elastic else "decode",
        session.budgets,
        is_fixed=not is_elastic or BUDGETS not in session.features,
        is_ready=session.connected and not (record.draining or load.draining or record.phase or session.is_suspect),
        age_s=session.silent_s,
        num_running=load.num_running,
        num_context_tokens=load.num_context_tokens,
        num_waiting_tokens=max(load.num_waiting_tokens, num_queued_tokens),
        max_running=record.max_num_seqs,
        num_kv_tokens=record.num_blocks * record.block_size,
        kv_usage=1 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0,
        rates=session.rates if session.connected else GUESSED,
    )
