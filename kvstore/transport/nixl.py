"""Reads blocks one-sidedly by NIXL: RDMA and NVLink spare the owner's processor, cma is one system call.

The owner hands out its agent's metadata, and whoever has it can read the whole pool; it goes to compatible peers only.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.block import BlockMemory, Run
from kvstore.errors import ReadFailed, TransportError
from kvstore.transport.base import LinkPeer
from kvstore.transport.devices import has_rdma
from kvstore.transport.host import HostFacts, can_read_memory, host_facts, on_same_host
from kvstore.transport.nixl_agent import AgentThread
from kvstore.transport.nixl_pool import PoolAddress, Remote, fitting_unit

if TYPE_CHECKING:
    from nixl_cu13._api import nixl_agent

logger = logging.getLogger(__name__)

# A read that has not ended so long after its link was aborted is ended by force, at the cost of all links.
_GIVE_UP_S: Final = 2.0
_MAX_CLOSE_S: Final = _GIVE_UP_S + 3.0
_MAX_STOP_S: Final = 10.0
_OWNERLESS: Final = frozenset({"cma"})
"""Lanes on which reads surely go on without the owner's process; on others UCX may do without the hardware."""


class _Descriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: HostFacts
    pool: PoolAddress


class NixlTransport:
    """One agent per process. `role` begins its name."""

    name = "nixl"
    two_sided = False
    is_still = False

    def __init__(self, memory: BlockMemory, role: str) -> None:
        self._memory = memory
        self._thread = AgentThread(_import_nixl(), role, memory)
        self._probe = ctypes.create_string_buffer(secrets.token_bytes(16), 16)
        self._host = host_facts(self._probe)
        self._links: set[NixlLink] = set()

    async def start(self) -> None:
        """Start the agent's thread and register the pool."""
        await asyncio.wrap_future(self._thread.start())

    def descriptor(self) -> bytes:
        """Our host, and the way to read our pool."""
        return msgspec.msgpack.encode(_Descriptor(self._host, self._thread.address))

    def lane_to(self, descriptor: bytes) -> str | None:
        """`cuda_ipc`, `cma` or `rdma` where both ends can; else `tcp`, which NIXL emulates in software."""
        try:
            peer = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        except msgspec.MsgspecError:
            return None
        try:
            fitting_unit(self._memory.geometry, peer.pool.geometry)
        except TransportError as error:
            logger.warning("nixl cannot read from a peer: %s", error)
            return None
        kinds = {"DRAM" if self._memory.device == "cpu" else "VRAM", peer.pool.memory_kind}
        if on_same_host(self._host, peer.host):
            if kinds == {"VRAM"}:
                return "cuda_ipc"
            if kinds == {"DRAM"} and can_read_memory(peer.host):
                return "cma"
        return "rdma" if self._host.has_rdma and peer.host.has_rdma else "tcp"

    def problem(self) -> str | None:
        """That the agent is gone, until it could be made anew."""
        return self._thread.problem

    @property
    def num_turns(self) -> int | None:
        """The turns of the agent's thread."""
        return self._thread.num_turns

    async def connect(self, peer: LinkPeer) -> NixlLink:
        """Load the owner's metadata, and read its token as a proof; the owner's end has nothing to do."""
        if not peer.dialled:
            is_driven = peer.lane not in _OWNERLESS
            self._thread.reader_came(is_driven)
            link = NixlLink(self._thread, peer.peer_id, "passive", None, self._links, is_driven)
        else:
            link = await self._connect_to_owner(peer)
        self._links.add(link)
        return link

    async def close(self) -> None:
        """Close all links and end the agent."""
        await asyncio.gather(*(link.close() for link in list(self._links)))
        _, running = await asyncio.wait([asyncio.wrap_future(self._thread.stop())], timeout=_MAX_STOP_S)
        if running:
            logger.error("nixl: the agent's thread does not end")

    async def _connect_to_owner(self, peer: LinkPeer) -> NixlLink:
        lane = self.lane_to(peer.descriptor)
        if lane is None:
            raise TransportError(f"nixl: {peer.peer_id} sent a descriptor that is none")
        if lane == "tcp":
            logger.warning("nixl: no fast lane to %s; over tcp, ucxx is faster and safer for the owner", peer.peer_id)
        pool = msgspec.msgpack.decode(peer.descriptor, type=_Descriptor).pool
        remote = await self._reach(peer, pool)
        return NixlLink(self._thread, peer.peer_id, lane, remote, self._links)

    async def _reach(self, peer: LinkPeer, pool: PoolAddress) -> Remote:
        """Connect with the owner's agent, and prove by its token that its memory is the one described."""
        adding = asyncio.wrap_future(self._thread.add_remote(pool))
        try:
            remote = await asyncio.shield(adding)
        except asyncio.CancelledError:
            adding.add_done_callback(self._remove_unwanted)
            raise
        checking = asyncio.wrap_future(self._thread.check(remote, pool))
        try:
            await asyncio.shield(checking)
        except TransportError:
            self._thread.remove_remote(remote, is_sound=False)
            if remote.is_former:  # its connection may have broken since
                return await self._reach(peer, pool)
            raise
        except asyncio.CancelledError:
            # The check goes on, into a place of its own, where it harms nobody; until it ends the agent must remember.
            logger.warning("nixl: %s did not let us read its token in time", peer.peer_id)
            checking.add_done_callback(lambda done: self._checked_in_vain(remote, done))
            raise
        return remote

    def _checked_in_vain(self, remote: Remote, checking: asyncio.Future[None]) -> None:
        is_sound = not checking.cancelled() and checking.exception() is None  # nobody else waits for it any more
        self._thread.remove_remote(remote, is_sound)

    def _remove_unwanted(self, adding: asyncio.Future[Remote]) -> None:
        if not adding.cancelled() and adding.exception() is None:
            self._thread.remove_remote(adding.result())


class NixlLink:
    """The reader's end reads by itself; the owner's end (`remote` None) does nothing."""

    def __init__(
        self,
        thread: AgentThread,
        peer_id: str,
        lane: str,
        remote: Remote | None,
        links: set[NixlLink],
        is_driven: bool = False,
    ) -> None:
        """`is_driven`: the owner's end, and reads need the turns of our agent's thread."""
        self.lane = lane
        self._thread = thread
        self._peer_id = peer_id
        self._remote = remote
        self._links = links
        self._is_driven = is_driven
        self._dead: str | None = None
        self._under_way: set[asyncio.Future[None]] = set()
        self.num_messages = 0

    def read(self, read_id: int, runs: Sequence[Run], landed: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """Read in one request; NIXL joins neighbours again."""
        if self._dead is not None or self._remote is None:
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(ReadFailed(f"nixl: link to {self._peer_id} is {self._dead or 'passive'}"))
            return failed
        remote_ids = [run.remote_first + i for run in runs for i in range(run.num_blocks)]
        local_ids = [run.local_first + i for run in runs for i in range(run.num_blocks)]
        reading = asyncio.wrap_future(self._thread.read(self._remote, remote_ids, local_ids, landed))
        self._under_way.add(reading)
        reading.add_done_callback(self._under_way.discard)
        return reading

    def serve(self, read_id: int, runs: Sequence[tuple[int, int]]) -> asyncio.Future[None]:
        """Raise: this is no two-sided transport."""
        raise TransportError("nixl: the owner takes no part in a read")

    def abort(self, reason: str) -> None:
        """Let reads end by themselves for a moment, then by force."""
        if self._dead is None:
            self._dead = f"aborted: {reason}"
            if self._remote is not None and self._under_way:
                self._thread.give_up(self._remote, _GIVE_UP_S)

    async def close(self) -> None:
        """Abort, wait until all reads have ended, and forget the owner's pool."""
        self.abort("closed")
        if self._under_way:
            _, stuck = await asyncio.wait(self._under_way, timeout=_MAX_CLOSE_S)
            if stuck:
                logger.error("nixl: %d reads from %s do not end", len(stuck), self._peer_id)
                for reading in stuck:
                    reading.add_done_callback(lambda _: self._forget())
        self._forget()

    def _forget(self) -> None:
        """Nothing, while a read goes on. Not waited for: the thread may be stuck in a call to a lost peer."""
        if self._under_way or self not in self._links:
            return
        self._links.remove(self)
        if self._remote is None:
            self._thread.reader_left(self._is_driven)
        else:
            self._thread.remove_remote(self._remote)


def _import_nixl() -> type[nixl_agent]:
    """Import NIXL with the settings that it needs in the environment; the user's own win. Raises `TransportError`."""
    if not has_rdma() and not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("UCX_TLS", "cma,tcp,self")  # what there is without RDMA and GPU; tcp carries control
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    try:
        from nixl_cu13._api import nixl_agent
    except (ImportError, OSError) as error:
        raise TransportError(f"nixl cannot be loaded (pip install tandem-serve[nixl]): {error}") from error
    agent_class: type[nixl_agent] = nixl_agent
    return agent_class
