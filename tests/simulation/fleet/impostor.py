"""A stranger that calls itself by a worker's name, and says that it has the peers' key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvstore.block import BlockLayout, HostMemory
from kvstore.errors import IncompatiblePeer, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange, Outside, PeerIdentity
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import ExchangeTimeouts
from tests.simulation.fleet.worker import PEER_KEYS
from tests.simulation.pool import Invariant
from tests.simulation.threads import SimThreads

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

_NUM_BLOCKS: Final = 4


class _BorrowedNames(PeerKeys):
    """The names of the peers' keys, which everybody can hear, over a key of its own."""

    @property
    def ids(self) -> list[bytes]:
        return PEER_KEYS.ids

    def shared(self, listener_ids: object, dialler_ids: object) -> bytes:
        return b"a key that the impostor has made up"


async def intrude(world: FleetWorld, name: str, layout: BlockLayout, address: str) -> None:
    """Dial somebody under a worker's name, with a later start than its own."""
    process = world.loop.process
    memory = HostMemory.allocate(_NUM_BLOCKS, layout.block_bytes)
    exchange = BlockExchange(
        PeerIdentity(f"{name}/9999", "decode", "9999", layout),
        memory,
        [world.make_transport(memory, process.name)],
        ExchangeTimeouts(connect_s=5.0),
        proof_key=None,
        keys=_BorrowedNames((b"not theirs",)),
        outside=Outside(world.net.of("x", process), world.loop.time, world.new_id, SimThreads(world.loop)),
    )
    world.judge(Invariant.ONLY_PEERS)
    try:
        peer_id = await exchange.connect(address)
    except (IncompatiblePeer, PeerUnreachable, PeerLost):
        world.reach("impostor refused")
    else:
        world.report(Invariant.ONLY_PEERS, f"{address} ({peer_id}) takes a stranger for {name}")
    await exchange.close()
