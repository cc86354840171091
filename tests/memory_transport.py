"""A transport inside one process, for tests of everything above it: it can delay, drop, cut and corrupt, from a seed.

Peers find each other in a `Switchboard` that the test makes and passes to each transport.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockMemory, Run
from kvstore.errors import ReadFailed, TransportError
from kvstore.transport.base import LinkPeer


@dataclass(frozen=True)
class Faults:
    """What goes wrong, as probabilities per read; delays are uniform up to `max_delay_s` per run of blocks."""

    max_delay_s: float = 0.0
    stall: float = 0.0
    """The read neither ends nor fails until the link is aborted."""
    fail: float = 0.0
    """The read ends with an error after some of its runs."""
    cut: float = 0.0
    """The whole link dies after some of the read's runs."""
    corrupt: float = 0.0
    """One bit of one block arrives flipped."""
    tell_every: int = 0
    """No fault: of every so many-th read whoever reads hears when its bytes have landed, before it ends; 0: of none."""


class Switchboard:
    """Where the transports of one test find each other's pools."""

    def __init__(self) -> None:
        self._pools: dict[bytes, BlockMemory] = {}
        self._next_number = itertools.count().__next__  # never that of a pool that was pulled out

    def plug_in(self, memory: BlockMemory) -> bytes:
        """Make a pool reachable; returns its number."""
        number = self._next_number().to_bytes(4, "big")
        self._pools[number] = memory
        return number

    def pull_out(self, number: bytes) -> None:
        """The pool's process has died, as it were: reads from it fail from now on."""
        self._pools.pop(number, None)

    def pool(self, number: bytes) -> BlockMemory | None:
        """Return the pool with this number, None where there is none (any more)."""
        return self._pools.get(number)


class MemoryTransport:
    """One-sided reads by copying within the process. `seed` fixes every fault."""

    name = "memory"
    two_sided = False
    is_still = False
    num_turns: int | None = None

    def __init__(
        self, memory: BlockMemory, switchboard: Switchboard, faults: Faults | None = None, seed: int = 0
    ) -> None:
        self.faults = faults or Faults()
        self._memory = memory
        self._switchboard = switchboard
        self._random = random.Random(seed)
        self._number = switchboard.plug_in(memory)
        self._links: list[MemoryLink] = []

    async def start(self) -> None:
        """Nothing to set up."""

    def descriptor(self) -> bytes:
        """The number of our pool at the switchboard."""
        return self._number

    def lane_to(self, descriptor: bytes) -> str | None:
        """`memory` where the pool is at our switchboard."""
        return "memory" if self._switchboard.pool(descriptor) is not None else None

    def problem(self) -> str | None:
        """None: nothing of it can break for good."""
        return None

    async def connect(self, peer: LinkPeer) -> MemoryLink:
        """Make our end of a link."""
        if peer.dialled and self._switchboard.pool(peer.descriptor) is None:
            raise TransportError(f"memory: {peer.peer_id} is not at the switchboard")
        link = MemoryLink(self, self._memory, self._switchboard, peer, self._random)
        self._links.append(link)
        return link

    async def close(self) -> None:
        """Abort all links and leave the switchboard."""
        self._switchboard.pull_out(self._number)
        for link in self._links:
            await link.close()


class MemoryLink:
    """The reader's end of a link copies by itself; the owner's end does nothing."""

    lane = "memory"
    num_messages = 0

    def __init__(
        self,
        transport: MemoryTransport,
        memory: BlockMemory,
        switchboard: Switchboard,
        peer: LinkPeer,
        random_source: random.Random,
    ) -> None:
        self._memory = memory
        self._switchboard = switchboard
        self._peer = peer
        self._transport = transport  # its faults may change while links are up
        self._random = random_source
        self._dead: str | None = None
        self._reads: dict[asyncio.Future[None], asyncio.TimerHandle | None] = {}

    def read(self, read_id: int, runs: Sequence[Run], landed: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """Start to copy, run by run, with the faults that the seed deals."""
        done = asyncio.get_running_loop().create_future()
        if self._dead is not None:
            done.set_exception(ReadFailed(f"memory: link to {self._peer.peer_id} is dead: {self._dead}"))
            return done
        pool = self._switchboard.pool(self._peer.descriptor)
        if pool is not None and not all(_fits(run, pool, self._memory) for run in runs):
            done.set_exception(ReadFailed(f"memory: {list(runs)} are not all in pools of {pool.num_blocks} blocks"))
            return done
        draw, faults = self._random.random, self._transport.faults
        self._reads[done] = None
        if draw() < faults.stall:
            return done
        copying = _Copying(
            done=done,
            runs=list(runs),
            fails_after=self._random.randrange(len(runs) + 1) if draw() < faults.fail else None,
            cuts_after=self._random.randrange(len(runs) + 1) if draw() < faults.cut else None,
            corrupts=self._random.randrange(len(runs)) if runs and draw() < faults.corrupt else None,
            landed=landed if faults.tell_every and read_id % faults.tell_every == 0 else None,
        )
        self._schedule(copying)
        return done

    def serve(self, read_id: int, runs: Sequence[tuple[int, int]]) -> asyncio.Future[None]:
        """Not a two-sided transport."""
        raise TransportError("memory: the owner takes no part in a read")

    def abort(self, reason: str) -> None:
        """End all reads at once."""
        if self._dead is None:
            self._dead = reason
        for done, timer in list(self._reads.items()):
            if timer is not None:
                timer.cancel()
            self._fail(done, f"aborted: {reason}")

    async def close(self) -> None:
        """The same: nothing goes on behind our back."""
        self.abort("closed")

    def _schedule(self, copying: _Copying) -> None:
        delay_s = self._random.uniform(0, self._transport.faults.max_delay_s)
        self._reads[copying.done] = asyncio.get_running_loop().call_later(delay_s, self._step, copying)

    def _step(self, copying: _Copying) -> None:
        """One run has arrived, or one of the faults has."""
        if copying.num_copied == copying.cuts_after:
            self.abort(f"cut after {copying.num_copied} runs")
        elif copying.num_copied == copying.fails_after:
            self._fail(copying.done, f"failed after {copying.num_copied} runs")
        elif copying.num_copied == len(copying.runs):
            del self._reads[copying.done]
            if copying.landed is not None:
                copying.landed()
            copying.done.set_result(None)
        else:
            pool = self._switchboard.pool(self._peer.descriptor)
            if pool is None:
                self.abort(f"{self._peer.peer_id} is gone")
                return
            run = copying.runs[copying.num_copied]
            for i in range(run.num_blocks):
                block = _bytes_of(pool, run.remote_first + i)
                if copying.num_copied == copying.corrupts and i == 0:
                    block[self._random.randrange(len(block))] ^= 1 << self._random.randrange(8)
                self._memory.scatter(run.local_first + i, block)
            copying.num_copied += 1
            self._schedule(copying)

    def _fail(self, done: asyncio.Future[None], detail: str) -> None:
        del self._reads[done]
        done.set_exception(ReadFailed(f"memory: read from {self._peer.peer_id} {detail}"))


@dataclass
class _Copying:
    done: asyncio.Future[None]
    runs: list[Run]
    fails_after: int | None
    cuts_after: int | None
    corrupts: int | None
    landed: Callable[[], None] | None
    num_copied: int = 0


def _fits(run: Run, remote: BlockMemory, local: BlockMemory) -> bool:
    in_remote = 0 <= run.remote_first <= remote.num_blocks - run.num_blocks
    return in_remote and 0 <= run.local_first <= local.num_blocks - run.num_blocks


def _bytes_of(memory: BlockMemory, block_id: int) -> npt.NDArray[np.uint8]:
    """Return a copy of a block, its pieces one behind the other."""
    block = memory.staging(1)
    if not isinstance(block, np.ndarray):
        raise TransportError(f"memory: the pool is in {memory.device}, only main memory can be copied")
    memory.gather(block_id, block)
    return block
