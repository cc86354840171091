"""Lends blocks: a lease from its owner's side, and the lending of prefixes.

    want (hashes) -> pin what is held -> lease over exactly these blocks, all announced at once -> lease closes -> unpin

Nothing is computed for a `want`: blocks that are not here are not offered, and one that finds nothing is revoked.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Sequence
from typing import Protocol

from kvstore.block import BlockHash
from kvstore.exchange.connection import Connection
from kvstore.exchange.reader import begin
from kvstore.protocol import (
    AbortOrdered,
    Action,
    AnnouncedBlock,
    BlocksComputed,
    Closed,
    LeaseEvent,
    LeaseMachine,
    LeaseOutcome,
    OwnerSession,
    Revoke,
    SendEnded,
    StartSend,
    Want,
)

logger = logging.getLogger(__name__)


class PrefixLender(Protocol):
    """Lends findable blocks: a worker's paged cache, a host-memory tier, a store node."""

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        """Pin the longest held prefix of `hashes` and return it, with ids and proofs; may be empty."""

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        """Unpin what `lend_prefix` returned; called exactly once for each of its answers that was not empty."""

    async def recheck(self, hashes: Sequence[BlockHash]) -> None:
        """Check the blocks that are here against their proofs; drop the changed ones: a reader got other bytes."""


class Lease:
    """Blocks that one reader may read. They stay the lease's until `closed` resolves; then the caller frees them."""

    def __init__(
        self, connection: Connection[OwnerSession], transfer_id: bytes, num_blocks: int, request_id: str = ""
    ) -> None:
        """Open it, and offer it. Raises ValueError where the transfer has a lease already."""
        opened_at = connection.tools.clock()
        opening = connection.session.open_lease(transfer_id, num_blocks, opened_at)
        self.transfer_id = transfer_id
        self.request_id = request_id  # for people
        self._context = contextvars.copy_context()  # what is logged of a transfer names the request that began it
        self._connection = connection
        self._opened_at = opened_at
        self.machine: LeaseMachine = connection.session.transfers[transfer_id]
        self._closed: asyncio.Future[LeaseOutcome] = asyncio.get_running_loop().create_future()
        connection.handles[transfer_id] = self
        connection.do(opening)

    @property
    def closed(self) -> asyncio.Future[LeaseOutcome]:
        """Resolves, always, when the lease is over and nothing of ours touches its blocks. Safe to cancel."""
        return asyncio.shield(self._closed)

    over = closed

    def describe(self) -> dict[str, object]:
        """Return the state, as plain values."""
        return {
            "transfer_id": self.transfer_id.hex(),
            "reader": self._connection.peer.peer_id,
            "request_id": self.request_id,
            "state": self.machine.state.value,
            "num_announced": len(self.machine.blocks),
        }

    def announce(self, first_index: int, blocks: Sequence[AnnouncedBlock], last: bool) -> None:
        """Tell the reader of newly computed blocks, in order; nothing happens once the lease is over.

        Raises ValueError for blocks out of order, too many, or a `last` that does not fit their number.
        """
        self._handle(BlocksComputed(first_index, blocks, last))

    def revoke(self, reason: str) -> None:
        """End the lease: the reader discards what it has. Nothing happens once the lease is over."""
        self._handle(AbortOrdered(reason))

    def _handle(self, event: LeaseEvent) -> None:
        connection = self._connection
        connection.do(connection.session.tell(self.transfer_id, event, connection.tools.clock()))

    def carry_out(self, action: Action) -> None:
        """Send blocks, or close."""
        match action:
            case StartSend(read_id, runs):
                sending = begin(lambda: self._connection.link.serve(read_id, runs))
                sending.add_done_callback(functools.partial(self._send_ended, read_id))
            case Closed(outcome):
                self._close(outcome)

    def _send_ended(self, read_id: int, done: asyncio.Future[None]) -> None:
        if (error := done.exception()) is not None:
            peer_id = self._connection.peer.peer_id
            self._warn("transfer %s: a send to %s failed: %s", self.transfer_id.hex(), peer_id, error)
            self._connection.close(f"a send failed: {error}")
        self._handle(SendEnded(read_id))

    def _warn(self, message: str, *arguments: object) -> None:
        self._context.run(logger.warning, message, *arguments)

    def _close(self, outcome: LeaseOutcome) -> None:
        peer_id, tools = self._connection.peer.peer_id, self._connection.tools
        del self._connection.handles[self.transfer_id]
        duration_s = tools.clock() - self._opened_at
        tools.observer.lease_ended(peer_id, outcome, len(self.machine.blocks), duration_s)
        if outcome in (LeaseOutcome.EXPIRED, LeaseOutcome.PEER_LOST):
            self._warn(
                "lease of transfer %s for %s ended after %.1f s: %s, %d of %d blocks announced",
                self.transfer_id.hex(),
                peer_id,
                duration_s,
                outcome.value,
                len(self.machine.blocks),
                self.machine.num_blocks,
            )
        self._closed.set_result(outcome)


async def lend(connection: Connection[OwnerSession], want: Want, lender: PrefixLender) -> None:
    """Serve one `want` from its arrival until the lease has closed."""
    transfer, reader = want.transfer_id.hex(), connection.peer.peer_id
    try:
        blocks = await lender.lend_prefix([BlockHash(block_hash) for block_hash in want.hashes])
    except Exception:  # whatever is wrong here: the reader is to know now, rather than to wait and blame us for it
        connection.send(Revoke(want.transfer_id, "nothing can be lent"))
        raise
    if not blocks:
        logger.debug("transfer %s: %s wants blocks, none is here", transfer, reader)
        connection.send(Revoke(want.transfer_id, "none of these blocks is here"))
        return
    try:
        if not connection.is_open or want.transfer_id in connection.handles:
            logger.warning("transfer %s: wanted, and gone before it was lent", transfer)
            return
        lease = Lease(connection, want.transfer_id, len(blocks), want.request_id)
        lease.announce(0, blocks, last=True)
        outcome = await lease.closed
        text = "transfer %s: lent %d of %d blocks to %s: %s"
        logger.debug(text, transfer, len(blocks), len(want.hashes), reader, outcome.name)
    finally:
        await lender.take_back(blocks)
