"""What workers and store nodes tell the prefix index of themselves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvstore.exchange import Outside
from kvstore.index import IndexWriter
from services.decode.config import DecodeConfig
from services.engine.native import Engine
from services.orders import GrpcOrders
from services.prefill.config import PrefillConfig
from services.store.config import StoreConfig
from services.store.http import StoreHttp
from services.store.metrics import StoreMetrics
from services.store.process import open_store
from services.worker.assembly import Role, Seams, assemble
from services.worker.config import WorkerConfig
from tests.hf_models import write_model
from tests.memory_transport import MemoryTransport, Switchboard
from tests.peers import PROOFS
from tests.store_node.store_world import LAYOUT
from tests.worker_records import worker_record

LEASE_S = 7.5


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The leases that index writers were made with."""
    made: list[float] = []

    class Writer(IndexWriter):
        def __init__(self, *names: object, lease_s: float, **others: object) -> None:
            made.append(lease_s)
            super().__init__(*names, lease_s=lease_s, **others)  # type: ignore[arg-type]

    monkeypatch.setattr("services.node.index_feed.IndexWriter", Writer)
    for module in ("worker.assembly", "store.process"):
        monkeypatch.setattr(
            f"services.{module}.make_transports", lambda _, memory, *__: [MemoryTransport(memory, Switchboard())]
        )
    return made


@pytest.mark.parametrize(("role", "config_class"), [("prefill", PrefillConfig), ("decode", DecodeConfig)])
async def test_a_workers_index_goes_by_the_lease_that_is_set(
    tmp_path: Path, leases: list[float], role: Role, config_class: type[WorkerConfig]
) -> None:
    model = write_model(tmp_path / "model", "llama3")
    config = config_class(model=str(model), lease_s=LEASE_S, block_size=16, num_gpu_blocks_override=128)
    assemble(config, role, Engine.from_config(config), "w0", "1", Seams(GrpcOrders(), Outside(), time.time))
    assert leases == [LEASE_S]


async def test_a_store_nodes_index_goes_by_the_lease_that_is_set(leases: list[float]) -> None:
    config, metrics = (
        StoreConfig(lease_s=LEASE_S, store_dram_bytes=1 << 16, redis="redis://127.0.0.1:1"),
        StoreMetrics(),
    )
    worker, http = worker_record(role="decode", layout=LAYOUT.to_wire()), StoreHttp("s0", metrics)
    http.address = "127.0.0.1:1"
    async with open_store(config, Outside(), PROOFS.blocks, worker, LAYOUT, metrics, http):
        assert leases == [LEASE_S]
