"""Whose blocks a store node keeps: the layout of the workers of its model, and of no other."""

from __future__ import annotations

import msgspec

from kvstore.block import BlockLayout
from kvstore.registry import WorkerRecord
from services.store.whose import choose_worker
from tests.store_node.store_world import LAYOUT
from tests.worker_records import worker_record


def record(
    worker_id: str, name: str = "m", layout: BlockLayout | None = LAYOUT, started_s: float = 1.0
) -> WorkerRecord:
    return worker_record(
        worker_id=worker_id,
        served_model_names=(name,),
        block_size=8,
        started_unix_s=started_s,
        layout=None if layout is None else layout.to_wire(),
    )


OTHER = BlockLayout(num_layers=4, num_kv_heads=1, block_size=8, head_dim=4, dtype="float32", model_fingerprint="cd34")


def test_without_a_name_the_only_layout_is_taken() -> None:
    first = record("prefill-0")
    assert choose_worker([], ()) is None
    assert choose_worker([first, record("decode-0", started_s=0.5)], ()) == (first, LAYOUT)


def test_without_a_name_there_is_no_telling_two_models_apart() -> None:
    assert choose_worker([record("prefill-0"), record("prefill-1", "n", OTHER)], ()) is None


def test_with_a_name_only_its_workers_count_and_the_newest_decides() -> None:
    old, new, foreign = record("a", started_s=1.0), record("b", layout=OTHER, started_s=2.0), record("c", "n")
    assert choose_worker([new, old, foreign], ("m", "alias")) == (new, OTHER)
    assert choose_worker([new, old, foreign], ("n",)) == (foreign, LAYOUT)
    assert choose_worker([foreign], ("m",)) is None


def test_store_nodes_and_workers_whose_layout_is_unknown_do_not_count() -> None:
    store = msgspec.structs.replace(record("store-0"), role="store")
    garbled = msgspec.structs.replace(record("prefill-1"), layout={"num_layers": 0})
    assert choose_worker([store, garbled, record("prefill-2", layout=None)], ()) is None
