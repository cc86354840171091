"""Defines a transport: it reads blocks of a peer's pool into ours, and knows when that is over.

A `Transport` belongs to one process and one pool. For each connection of two peers it makes a `Link` at either end;
reads go one way, from the peer that dialled (the reader) to the one that accepted (the owner). All calls are made, and
all futures resolve, in the event loop in which the transport was started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.block import Run


@dataclass(frozen=True)
class LinkPeer:
    """The other end of a link to be made."""

    peer_id: str
    descriptor: bytes
    """What the owner's transport of the same name gave as its `descriptor()`; empty at the owner's end."""
    link_id: bytes
    """16 random bytes, the same at both ends, new for each connection."""
    host: str
    """The peer's address as seen on the control connection."""
    dialled: bool
    """Whether we are the reader, who also initiates whatever the transport has to set up."""
    lane: str
    """On which the reader reads; empty at the owner's end where the reader has not said so."""


class Link(Protocol):
    """One end of a link. A reader only reads, an owner only serves."""

    @property
    def lane(self) -> str:
        """The carrier of the bytes, for people and metrics: `tcp`, `cma`, `rdma`, `cuda_ipc` ..."""

    @property
    def num_messages(self) -> int:
        """How many messages have come so far, or parts of them, for who watches that any do; 0 where blocks show it."""

    def read(self, read_id: int, runs: Sequence[Run], landed: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """Start to read. The future resolves only when the read has *really* ended: no byte of it can land after.

        It ends with `ReadFailed` where it went wrong, and then the destination holds anything. Callers do not cancel
        it. Two-sided transports need the owner to `serve` the same `read_id` with the same runs.

        `landed` is for what is best done at once, while the bytes are in the processor's cache. A transport whose own
        thread has copied them calls it there, when the read has ended well and before the future resolves; others do
        not. It raises nothing.
        """

    def serve(self, read_id: int, runs: Sequence[tuple[int, int]]) -> asyncio.Future[None]:
        """Send blocks, each run `(first_block_id, num_blocks)` as one message; two-sided transports only.

        The future resolves when the blocks are no more touched, with `ReadFailed` where the send went wrong.
        """

    def abort(self, reason: str) -> None:
        """End all reads and serves, soon, with `ReadFailed`; the link is dead then. May be called again."""

    async def close(self) -> None:
        """Abort, wait until everything has ended, and free what the link holds. May be called again."""


class Transport(Protocol):
    """One way of moving blocks in and out of one pool."""

    is_still: bool
    """Noted by whoever watches it: its thread does not come round at present. Not offered to peers then."""

    @property
    def name(self) -> str:
        """The transport's name, as in `--kv-transport` and on the wire."""

    @property
    def two_sided(self) -> bool:
        """Whether the owner's process has to take part in every read."""

    async def start(self) -> None:
        """Set up, in the running loop. Raises `TransportError`."""

    def descriptor(self) -> bytes:
        """The bytes by which a peer reaches us; opaque to all but this transport."""

    def lane_to(self, descriptor: bytes) -> str | None:
        """Return the lane on which we would read from the peer with this descriptor, or None. Never raises."""

    def problem(self) -> str | None:
        """Why no new link can be made at present, or None. A transport with a problem is not offered to peers."""

    @property
    def num_turns(self) -> int | None:
        """How often the transport's own thread has come round, for who watches that it does; None: it has none."""

    async def connect(self, peer: LinkPeer) -> Link:
        """Make our end of a link; both ends call this, at about the same time. Raises `TransportError`.

        The caller bounds it in time by cancelling it.
        """

    async def close(self) -> None:
        """Close all links and free everything, in bounded time. May be called again."""
