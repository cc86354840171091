"""What a router knows and does as a whole, be it one process or several: a view for each such thing.

A view says what one process answers, and how the answers of several become one. An endpoint asks `of_all`: in a router
of one process that is a plain call; else every process answers (`processes`), whichever of them the client has reached.
To make an endpoint speak for all processes, add a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Generic, TypeVar, cast

import msgspec

from services.router.edge import RouterParts
from services.router.metrics import text_of
from services.router.processes import METRICS, Snapshot, number_in
from services.router.readiness import readiness

T = TypeVar("T")
Rows = list[dict[str, object]]


@dataclass(frozen=True)
class View(Generic[T]):
    """`of_one` is called in the event loop with the parts and the arguments: plain values all, as what it returns."""

    name: str
    of_one: Callable[..., T]
    merge: Callable[[Sequence[T]], T]


async def of_all(parts: RouterParts, view: View[T], *arguments: object, request_id: str = "") -> T:
    """What all processes answer. `request_id`: whoever is named in it is asked first, and the others if that knows
    nothing. Raises NoAnswer where none answers in time.
    """
    if parts.siblings is None:
        return view.of_one(parts, *arguments)
    if number := number_in(request_id):
        found = view.merge(cast("list[T]", await parts.siblings.gather(view.name, arguments, number)))
        if found:
            return found
    return view.merge(cast("list[T]", await parts.siblings.gather(view.name, arguments)))


def answer(parts: RouterParts, name: str, arguments: Sequence[object]) -> object:
    """What this process answers to another one's question."""
    return VIEWS[name].of_one(parts, *arguments)


async def exposition(parts: RouterParts) -> bytes:
    """The series of all processes in Prometheus text format 0.0.4."""
    if parts.siblings is None:
        return parts.metrics.exposition()
    answers = await parts.siblings.gather(METRICS, ())
    return text_of(msgspec.convert(answers[0], Snapshot))


# ---- decisions ---------------------------------------------------------------


def _decisions(parts: RouterParts, tenant: str, request_id: str) -> Rows:
    return [entry.to_json() for entry in parts.placer.log.find(tenant, request_id)]


def _by_time(answers: Sequence[Rows]) -> Rows:
    return sorted(chain.from_iterable(answers), key=lambda row: cast(float, row["unix_seconds"]))


DECISIONS: Final = View("decisions", _decisions, _by_time)
"""Of a tenant's request: why it went where. A client may have used an id twice, at two processes."""


# ---- aborts ------------------------------------------------------------------


def _abort(parts: RouterParts, tenant: str, request_ids: Sequence[str]) -> list[str]:
    return parts.stopping.abort(tenant, request_ids)


def _each_once(answers: Sequence[list[str]]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(answers)))


ABORT: Final = View("abort", _abort, _each_once)
"""Ends requests of a tenant's by their ids; those that ran."""


# ---- load --------------------------------------------------------------------


def _load(parts: RouterParts) -> dict[str, int]:
    running, waiting = parts.admission.num_running, parts.admission.num_waiting
    return {"server_load": running + waiting, "num_running": running, "num_waiting": waiting}


def _added_up(answers: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(each[name] for each in answers) for name in answers[0]}


LOAD: Final = View("load", _load, _added_up)


# ---- readiness ---------------------------------------------------------------


def _readiness(parts: RouterParts) -> tuple[list[str], dict[str, str]]:
    return readiness(parts.models, parts.workers)


def _ready_everywhere(answers: Sequence[tuple[list[str], dict[str, str]]]) -> tuple[list[str], dict[str, str]]:
    """Whoever takes the next request must be able to serve it."""
    reasons = {name: reason for _, not_ready in answers for name, reason in not_ready.items()}
    known = dict.fromkeys(chain.from_iterable(models for models, _ in answers))
    models = [name for name in known if all(name in ready for ready, _ in answers)]
    late = {name: "one process of this router does not know it yet" for name in known if name not in models}
    return models, {name: reason for name, reason in (late | reasons).items() if name not in models}


READINESS: Final = View("readiness", _readiness, _ready_everywhere)
"""The models that can be served, and of the others why not (`readiness`)."""


# ---- workers -----------------------------------------------------------------


def _workers(parts: RouterParts) -> Rows:
    decode = parts.workers.decode_candidates()
    connected = {worker.worker_id for worker in decode if worker.connected}
    role_now = {worker.worker_id: worker.bending.role for worker in decode}
    return [
        {
            "worker_id": record.worker_id,
            "incarnation": record.incarnation,
            "role": record.role,
            "role_now": role_now.get(record.worker_id),
            "models": record.model_names,
            "connected": not record.phase and (not record.decodes or record.worker_id in connected),
            "draining": record.draining,
            "phase": record.phase,
            "is_simulation": record.is_simulation,
        }
        for record in (*parts.workers.records, *parts.workers.starting)
    ]


def _connected_everywhere(answers: Sequence[Rows]) -> Rows:
    by_key = [{(row["worker_id"], row["incarnation"]): row for row in rows} for rows in answers]
    rows = {key: row for each in reversed(by_key) for key, row in each.items()}
    return [
        row | {"connected": all(each.get(key, {}).get("connected", False) for each in by_key)}
        for key, row in rows.items()
    ]


WORKERS: Final = View("workers", _workers, _connected_everywhere)
"""Those that are known; connected are those that every process can use."""

# ---- the controller ----------------------------------------------------------


def _controller(parts: RouterParts) -> Rows:
    return parts.controller.to_json()


def _by_leader(answers: Sequence[Rows]) -> Rows:
    """Of each model what its leader says, if it is one of these."""
    found: dict[object, dict[str, object]] = {}
    for row in chain.from_iterable(answers):
        if row["is_leader"] or row["model_fingerprint"] not in found:
            found[row["model_fingerprint"]] = row
    return list(found.values())


CONTROLLER: Final = View("controller", _controller, _by_leader)
"""Who leads the elastic workers of each model, and the last decisions."""

_SERIES: Final = View("metrics", lambda parts: parts.metrics.snapshot(), lambda answers: answers[0])
"""Which the processes' parent adds up (`exposition`)."""

VIEWS: Final[dict[str, View[Any]]] = {
    view.name: view for view in (DECISIONS, ABORT, LOAD, READINESS, WORKERS, CONTROLLER, _SERIES)
}
