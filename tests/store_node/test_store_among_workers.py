"""A store node in the registry is a holder of blocks to the router, and never a worker."""

from __future__ import annotations

import time

from services.router.fleet import Workers
from tests.memory_orders import MemoryOrders
from tests.router.harness import FakeMembership
from tests.store_node.store_world import LAYOUT
from tests.worker_records import worker_record


async def test_the_router_sends_a_store_node_nothing_and_knows_where_to_fetch_from_it() -> None:
    store = worker_record(worker_id="store-0", role="store", incarnation="7", block_size=8, layout=LAYOUT.to_wire())
    workers = Workers(FakeMembership((store,)), "router-0", MemoryOrders(), time.monotonic, reconnect_max_s=1.0)
    workers.start()
    assert (workers.decode_candidates(), workers.prefill_candidates(), workers.num_sessions_up) == ([], [], 0)
    found = workers.registered(("store-0", "7"))
    assert found is not None
    assert found.kv_address == "127.0.0.1:2"
    await workers.close()
