"""`python -m tests.vllm.ucx_process vllm nixl ucxx`: loads these in this order, and has nixl and ucxx move 8 MiB each.

NIXL and ucxx bring a UCX each, and vLLM brings torch and its libraries. Ends with status 0 if every byte has come, and
prints what is left in the environment of UCX's settings.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

SIZE = 8 << 20


def load_vllm() -> None:
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401


def load_nixl() -> Callable[[], None]:
    from kvstore.transport.nixl import _import_nixl

    make = _import_nixl()

    def read(number: int = 0) -> None:
        from nixl_cu13._api import nixl_agent_config

        source = np.random.default_rng(number).integers(0, 256, SIZE, np.uint8)
        target = np.zeros_like(source)
        owner, reader = (make(name, nixl_agent_config(enable_prog_thread=False)) for name in ("owner", "reader"))
        for agent, array in ((owner, source), (reader, target)):
            agent.register_memory([(array.ctypes.data, SIZE, 0, "")], "DRAM")
        peer = reader.add_remote_agent(owner.get_agent_metadata())
        here = reader.prep_xfer_dlist("NIXL_INIT_AGENT", [(target.ctypes.data, SIZE, 0)], "DRAM")
        there = reader.prep_xfer_dlist(
            peer.decode() if isinstance(peer, bytes) else peer, [(source.ctypes.data, SIZE, 0)], "DRAM"
        )
        only = np.array([0], np.int32)
        handle = reader.make_prepped_xfer("READ", here, only, there, only)
        state = reader.transfer(handle)
        while state == "PROC":
            owner.get_new_notifs()
            state = reader.check_xfer_state(handle)
        assert state == "DONE"
        assert np.array_equal(source, target)

    return read


def load_ucxx() -> tuple[Any, dict[str, str]]:
    from kvstore.transport.ucxx import import_ucxx

    return import_ucxx()


async def move(ucxx: Any, options: dict[str, str], read: Callable[[], None]) -> None:
    """A message of ucxx's, while nixl reads between its being sent and received."""
    from ucxx._lib.arr import Array

    ucxx.init(options, progress_mode="thread", enable_python_future=True)
    source = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    target = np.zeros_like(source)

    async def serve(endpoint: Any) -> None:
        await endpoint.send(Array(source), tag=7, force_tag=True)

    listener = ucxx.create_listener(serve)
    endpoint = await ucxx.create_endpoint("127.0.0.1", listener.port)
    read()
    await endpoint.recv(Array(target), tag=7, force_tag=True)
    assert np.array_equal(source, target)
    await endpoint.close()
    ucxx.stop_notifier_thread()


def main(order: list[str]) -> None:
    loaded = {name: {"vllm": load_vllm, "nixl": load_nixl, "ucxx": load_ucxx}[name]() for name in order}
    read: Any = loaded["nixl"]
    ucxx, options = loaded["ucxx"]  # type: ignore[misc]
    read()
    asyncio.run(asyncio.wait_for(move(ucxx, options, read), 60))
    print(*sorted(name for name in os.environ if name.startswith("UCX_RNDV_")))
    sys.stdout.flush()
    os._exit(0)  # what is registered with two agents is in no hurry to go


if __name__ == "__main__":
    main(sys.argv[1:])
