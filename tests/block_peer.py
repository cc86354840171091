"""A process that speaks the block protocol with a live stack over UCX. It takes blocks over, and it may lie."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash, BlockLayout, HostMemory, Proof
from kvstore.errors import UnprovenPeer
from kvstore.exchange import BlockExchange, PeerIdentity
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import AnnouncedBlock, ExchangeTimeouts, Reservation
from kvstore.registry import WorkerRecord, new_incarnation
from kvstore.transport import make_transports
from tests.peers import PROOFS
from tests.stack import FORK_SERVER

_NUM_SLOTS = 512
_WAIT_S = 60.0
# Whoever waits for a processor, it or the stack's processes, is not taken for lost.
_PATIENT = ExchangeTimeouts(
    peer_timeout_s=20.0, connect_s=_WAIT_S, lease_ttl_s=_WAIT_S, read_s=_WAIT_S, confirm_s=_WAIT_S
)


class BlockPeer:
    """The test's end of it: a context manager. The layout is that of the workers it will talk with."""

    def __init__(self, record: WorkerRecord, *, has_secret: bool = True) -> None:
        self._layout = record.layout or {}
        self._has_secret = has_secret

    def __enter__(self) -> BlockPeer:
        self._connection, other = FORK_SERVER.Pipe()
        self._process = FORK_SERVER.Process(target=_run, args=(other, self._layout, self._has_secret), name="peer")
        self._process.start()
        other.close()
        self._address, self._incarnation = self._receive()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which ends it
        self._process.join(_WAIT_S)
        self._process.kill()

    def fetch(self, holder: WorkerRecord, hashes: Sequence[BlockHash]) -> list[bytes]:
        """Take these blocks over from a worker or a store node; returns their bytes."""
        return list(self._order("fetch", holder.kv_address, list(hashes)))

    def flip(self, block_hash: BlockHash, offset: int) -> None:
        """What is sent of this block from now on is not what is announced."""
        self._order("flip", block_hash, offset)

    def hold(self, hashes: Sequence[BlockHash], content: bytes, proofs: Sequence[int]) -> None:
        """Claim that these blocks have this content, each with the proof given."""
        self._order("hold", list(hashes), content, list(proofs))

    def swap(self, one: BlockHash, other: BlockHash, *, content: bool, proofs: bool) -> None:
        """Lend one block's content, proof or both under the other's name, and the other way round."""
        self._order("swap", one, other, content, proofs)

    def offer(self, store: WorkerRecord, hashes: Sequence[BlockHash]) -> str:
        """Tell a store node that we hold this chain, for it to take over. Returns why it did not let us in."""
        return str(self._order("offer", store.kv_address, list(hashes)))

    def suspected(self) -> list[BlockHash]:
        """The blocks of which readers said that the bytes are wrong."""
        return list(self._order("suspected"))

    def source(self, num_blocks: int) -> pb.PrefixSource:
        """The hint that we have the first blocks of a prompt."""
        return pb.PrefixSource(
            holder_id="peer",
            incarnation=self._incarnation,
            kv_address=self._address,
            num_blocks=num_blocks,
            tier="store",
        )

    def _order(self, name: str, *arguments: object) -> Any:
        self._connection.send((name, arguments))
        return self._receive()

    def _receive(self) -> Any:
        assert self._connection.poll(_WAIT_S), "no answer from the peer"
        return self._connection.recv()


class _Peer:
    """Lends what it has taken over under the proofs that it came with. Every public coroutine is an order."""

    def __init__(self, layout: BlockLayout, has_secret: bool) -> None:
        self._memory = HostMemory.allocate(_NUM_SLOTS, layout.block_bytes)
        self._slots: dict[BlockHash, tuple[int, Proof]] = {}
        self._suspected: list[BlockHash] = []
        self.incarnation = new_incarnation()
        identity = PeerIdentity(f"peer/{self.incarnation}", "store", self.incarnation, layout)
        transports = make_transports("ucxx", self._memory, "peer", "127.0.0.1")
        keys = PROOFS.blocks if has_secret else PeerKeys((os.urandom(32),))
        self.exchange = BlockExchange(
            identity, self._memory, transports, _PATIENT, proof_key=None, keys=keys, lender=self
        )

    async def fetch(self, address: str, hashes: list[BlockHash]) -> list[bytes]:
        first = len(self._slots)

        async def reserve(num_blocks: int) -> Reservation:
            return Reservation(list(range(first, first + num_blocks)))

        owner = await self.exchange.connect(address)
        result = await self.exchange.fetch_prefix(first.to_bytes(16, "big"), owner, hashes, reserve).result
        assert result.failure is None, result.failure
        for block_hash, slot, proof in zip(hashes, result.block_ids, result.proofs, strict=True):
            self._slots[block_hash] = (slot, proof)
        return [self._memory.view(slot).tobytes() for slot in result.block_ids]

    async def flip(self, block_hash: BlockHash, offset: int) -> None:
        self._memory.view(self._slots[block_hash][0])[offset] ^= 1

    async def hold(self, hashes: list[BlockHash], content: bytes, proofs: list[int]) -> None:
        for block_hash, proof in zip(hashes, proofs, strict=True):
            slot = len(self._slots)
            self._memory.view(slot)[:] = np.frombuffer(content, dtype=np.uint8)
            self._slots[block_hash] = (slot, Proof(proof))

    async def swap(self, one: BlockHash, other: BlockHash, content: bool, proofs: bool) -> None:
        slots, tags = zip(self._slots[one], self._slots[other], strict=True)
        slots, tags = slots[::-1] if content else slots, tags[::-1] if proofs else tags
        self._slots[one], self._slots[other] = zip(slots, tags, strict=True)

    async def offer(self, address: str, hashes: list[BlockHash]) -> str:
        try:
            owner = await self.exchange.connect(address)
        except UnprovenPeer as error:
            return str(error)
        self.exchange.tell_have(owner, self.exchange.address, None, hashes)
        return ""

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        held = hashes[: next((i for i, each in enumerate(hashes) if each not in self._slots), len(hashes))]
        return [AnnouncedBlock(slot, each, proof) for each in held for slot, proof in [self._slots[each]]]

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        """What is lent stays where it is."""

    async def recheck(self, hashes: Sequence[BlockHash]) -> None:
        self._suspected += hashes

    async def suspected(self) -> list[BlockHash]:
        return self._suspected


def _run(connection: Connection, layout: dict[str, Any], has_secret: bool) -> None:
    asyncio.run(_serve(connection, BlockLayout.from_wire(layout), has_secret))


async def _serve(connection: Connection, layout: BlockLayout, has_secret: bool) -> None:
    peer = _Peer(layout, has_secret)
    await peer.exchange.start("127.0.0.1", 0)
    connection.send((peer.exchange.address, peer.incarnation))
    try:
        while (order := await asyncio.to_thread(_next_order, connection)) is not None:
            name, arguments = order
            connection.send(await getattr(peer, name)(*arguments))
    finally:
        await peer.exchange.close()  # else the process of a peer that failed would not end, and the test would wait


def _next_order(connection: Connection) -> tuple[str, tuple[object, ...]] | None:
    """None: the test needs no peer any more."""
    try:
        name, arguments = connection.recv()
    except EOFError:
        return None
    return name, arguments
