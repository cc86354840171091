"""A worker in a process of its own, over a real transport: `python -m tests.exchange.exchange_peer TRANSPORT NAME`.

Takes orders as lines on stdin and answers with lines `> JSON` on stdout; UCX itself writes to stdout as well.
"""

import asyncio
import json
import sys
from typing import Any

import numpy as np

from kvstore.block import BlockLayout, HostMemory
from kvstore.errors import KVStoreError
from kvstore.exchange import BlockExchange, Fetch, PeerIdentity
from kvstore.protocol import AnnouncedBlock, ExchangeTimeouts, FetchState, Reservation
from kvstore.transport import make_transports
from tests.peers import PROOFS
from tests.proofs import KEY, prove_handoff
from tests.waiting import until

LAYOUT = BlockLayout(4, 2, 32, 64, "bfloat16", "ab12")  # 64 KiB a block
NUM_BLOCKS = 256
TIMEOUTS = ExchangeTimeouts(heartbeat_s=0.2, peer_timeout_s=3.0, lease_ttl_s=1.5, drain_s=1.0)


def content(name: str) -> np.ndarray:
    """The pool of the worker called `name`."""
    return np.random.default_rng(len(name)).integers(0, 256, (NUM_BLOCKS, LAYOUT.block_bytes), np.uint8)


class Peer:
    """Every public coroutine is an order."""

    def __init__(self, transport: str, name: str) -> None:
        self.memory = HostMemory.allocate(NUM_BLOCKS, LAYOUT.block_bytes)
        self.memory.array[:] = content(name)
        identity = PeerIdentity(name, name.partition("-")[0], f"{name}-1", LAYOUT)
        transports = make_transports(transport, self.memory, name, "127.0.0.1")
        self.exchange = BlockExchange(identity, self.memory, transports, TIMEOUTS, proof_key=KEY, keys=PROOFS.blocks)
        self.fetches: dict[str, Fetch] = {}

    async def connect(self, address: str) -> Any:
        peer_id = await self.exchange.connect(address)
        owners = self.exchange.state()["owners"]
        assert isinstance(owners, list)
        return peer_id, owners[0]["transport"], owners[0]["lane"]

    async def lease(self, transfer_id: str, reader: str, block_ids: list[int], hang: bool) -> Any:
        """Announce blocks, all of them or (`hang`) all but the last."""
        lease = self.exchange.open_lease(transfer_id.encode(), reader, len(block_ids))
        proofs = prove_handoff(self.memory, block_ids, transfer_id.encode())
        blocks = [AnnouncedBlock(*block) for block in zip(block_ids, [None] * len(block_ids), proofs, strict=True)]
        half = len(blocks) // 2
        lease.announce(0, blocks[:half], last=False)
        await asyncio.sleep(0.01)
        lease.announce(half, blocks[half : -1 if hang else len(blocks)], last=not hang)
        return (await lease.closed).value

    async def order(self, transfer_id: str, owner: str, block_ids: list[int]) -> Any:
        """Start a fetch; it must wait before the owner offers."""

        async def reserve(num_blocks: int) -> Reservation:
            return Reservation(block_ids)

        self.fetches[transfer_id] = self.exchange.fetch(transfer_id.encode(), owner, [None] * len(block_ids), reserve)

    async def until_reading(self) -> Any:
        """Wait until a fetch has its blocks and the owner's names of the first ones."""

        def reads() -> bool:
            fetches = self.exchange.state()["fetches"]
            assert isinstance(fetches, list)
            return any(fetch["state"] == FetchState.READING.value for fetch in fetches)

        await until(reads)

    async def outcome(self, transfer_id: str, owner: str, block_ids: list[int], source_ids: list[int]) -> Any:
        """Wait for a fetch, and compare the bytes with the owner's, which follow from its name."""
        fetch = self.fetches.pop(transfer_id)
        result = await fetch.result
        returned = await fetch.quiesced
        same = bool((self.memory.array[block_ids] == content(owner)[source_ids]).all())
        return result.failure.cause.value if result.failure else "ok", same, len(returned)


async def main() -> None:
    peer = Peer(sys.argv[1], sys.argv[2])
    await peer.exchange.start("127.0.0.1", 0)
    print(">", json.dumps(["address", peer.exchange.address]), flush=True)
    lines, tasks = asyncio.StreamReader(), set[asyncio.Task[None]]()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)

    async def carry_out(key: str, order: str, arguments: list[Any]) -> None:
        try:
            answer = await getattr(peer, order)(*arguments)
        except KVStoreError as error:
            answer = f"{type(error).__name__}: {error}"
        print(">", json.dumps([key, answer]), flush=True)

    while line := await lines.readline():
        task = asyncio.ensure_future(carry_out(*json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await peer.exchange.close()
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main())
