"""Keeps the last decisions of a controller, for `/debug/controller` and the log. Pure.

A fleet that is left alone is decided upon each second, for the same reason: such decisions are one entry with the
latest numbers. What changes something always has an entry of its own.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable
from typing import Final

from services.router.roles.explain import Verdict
from services.router.roles.measurements import FleetView, WorkerView

_KEPT: Final = 64
_NUMBER: Final = re.compile(r"-?\d[\d.e+-]*")


class Minutes:
    """One model's."""

    def __init__(self) -> None:
        self._entries: deque[dict[str, object]] = deque(maxlen=_KEPT)
        self._last = ""

    def note(self, verdict: Verdict, view: FleetView | None, unix_s: float) -> bool:
        """Enter a decision; whether it is another one than before."""
        gate = "" if verdict.gate is None else verdict.gate.measurement
        kind = f"{verdict.kind} {_NUMBER.sub('#', verdict.reason)} {gate}"
        is_news = verdict.kind != "none" or kind != self._last
        entry: dict[str, object] = {
            "unix_seconds": unix_s,
            "since_unix_seconds": unix_s,
            "decision": verdict.kind,
            "reason": verdict.reason,
            "changes": [
                {
                    "worker_id": change.worker_id,
                    "incarnation": change.incarnation,
                    "role": change.role,
                    "tpot_budget_seconds": finite(change.budgets.tpot_s),
                    "prompt_tokens_budget": change.budgets.prompt_tokens,
                }
                for change in verdict.changes
            ],
            "inputs": {name: finite(value) for name, value in verdict.inputs.items()},
            "workers": worker_rows(view.workers if view is not None else ()),
            "counterfactual": verdict.counterfactual,
            "gate": None if verdict.gate is None else verdict.gate.to_json(),
        }
        if not is_news and self._entries:
            entry["since_unix_seconds"] = self._entries.pop()["since_unix_seconds"]
        self._entries.append(entry)
        self._last = kind
        return is_news

    def to_json(self) -> list[dict[str, object]]:
        """The latest last."""
        return list(self._entries)


def worker_rows(workers: Iterable[WorkerView]) -> list[dict[str, object]]:
    """The workers of a view, as JSON."""
    return [
        {
            "worker_id": worker.worker_id,
            "incarnation": worker.incarnation,
            "role": worker.role,
            "tpot_budget_seconds": finite(worker.budgets.tpot_s),
            "prompt_tokens_budget": worker.budgets.prompt_tokens,
            "fixed": worker.is_fixed,
            "ready": worker.is_ready,
            "age_seconds": finite(worker.age_s),
            "num_running": worker.num_running,
            "num_context_tokens": worker.num_context_tokens,
            "num_waiting_tokens": worker.num_waiting_tokens,
            "kv_usage": finite(worker.kv_usage),
        }
        for worker in workers
    ]


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
