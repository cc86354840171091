"""Says which models can be served now, and why the others cannot."""

from __future__ import annotations

from services.router.fleet import Workers
from services.router.text import ModelDirectory


def readiness(models: ModelDirectory, workers: Workers) -> tuple[list[str], dict[str, str]]:
    """The models that are ready, and the others' reasons by name.

    One is ready with its files loaded and a connected decode worker, not draining, that has who prefills.
    """
    reachable: set[str] = set()
    waiting: set[str] = set()
    for candidate in workers.decode_candidates():
        if candidate.connected and not candidate.draining:
            (waiting if workers.awaits_prefill(candidate) else reachable).update(candidate.model_names)
    not_ready = models.not_loaded()
    for name in models.names():
        if name in waiting - reachable:
            not_ready[name] = "no prefill worker of it has registered yet"
        elif name not in reachable:
            not_ready[name] = "no decode worker of it is connected"
    for worker in workers.starting:
        for name in worker.served_model_names:
            if name not in reachable:
                not_ready.setdefault(name, f"{worker.worker_id} is {worker.phase}")
    return [name for name in models.names() if name in reachable], not_ready
