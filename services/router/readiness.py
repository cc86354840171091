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
    for worker in workers.decode_candidates():
        if worker.connected and not worker.draining:
            (waiting if workers.awaits_prefill(worker) else reachable).update(worker.model_names)
    not_ready = models.not_loaded()
    for name in models.names():
        if name in waiting - reachable:
            not_ready[name] = "no prefill worker of it has registered yet"
        elif name not in reachable:
            not_ready[name] = "no decode worker of it is connected"
    return [name for name in models.names() if name in reachable], not_ready
