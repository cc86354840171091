"""Chooses whose blocks a store node keeps: the layout of the workers that serve its model. Pure."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstore.block import BlockLayout
from kvstore.errors import InvalidLayout
from kvstore.registry import WorkerRecord

log = logging.getLogger(__name__)


def choose_worker(
    records: Sequence[WorkerRecord], served_model_names: Sequence[str]
) -> tuple[WorkerRecord, BlockLayout] | None:
    """The worker whose layout the node adopts; None while there is no such worker, or no telling which.

    With names: the newest worker that serves one of them, so that a node started in mid-rollout keeps what will stay.
    Without: any, if all workers have one layout.
    """
    found: list[tuple[WorkerRecord, BlockLayout]] = []
    for record in records:
        layout = layout_of(record)
        is_ours = not served_model_names or set(served_model_names) & set(record.served_model_names)
        if record.role != "store" and layout is not None and is_ours:
            found.append((record, layout))
    if not served_model_names and len({layout for _, layout in found}) > 1:
        names = sorted({name for record, _ in found for name in record.served_model_names})
        log.warning("the workers serve several models: say by --served-model-name which of %s", ", ".join(names))
        return None
    return max(found, key=lambda pair: (pair[0].started_unix_s, pair[0].worker_id), default=None)


def layout_of(record: WorkerRecord) -> BlockLayout | None:
    """The layout in a record; None if there is none that we understand."""
    if record.layout is None:
        return None
    try:
        return BlockLayout.from_wire(record.layout)
    except InvalidLayout as error:
        log.warning("%s announces a layout that is none: %s", record.worker_id, error)
        return None
