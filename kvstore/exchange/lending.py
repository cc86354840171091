"""The owner's side of a prefix fetch: a reader names block hashes, we lend the longest prefix of them that we hold.

    want (hashes) -> pin what is held -> lease over exactly these blocks, all announced at once -> lease closes -> unpin

Nothing is computed for such a reader: blocks that are not here are not offered, and a `want` that finds nothing is
answered by a `revoke`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from kvstore.block import BlockHash
from kvstore.exchange.owner import OwnerSession
from kvstore.protocol import AnnouncedBlock, Revoke, Want

logger = logging.getLogger(__name__)


class PrefixLender(Protocol):
    """Whoever holds findable blocks: a worker's paged cache, a host-memory tier, a store node."""

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        """Pin the longest held prefix of `hashes` and return it, with ids and proofs; may be empty."""

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        """Unpin what `lend_prefix` returned; called exactly once for each of its answers that was not empty."""

    async def recheck(self, hashes: Sequence[BlockHash]) -> None:
        """Hold these blocks against their proofs, as far as they are here, and drop what has changed: a reader got
        other bytes than were announced.
        """


async def lend(session: OwnerSession, want: Want, lender: PrefixLender) -> None:
    """Serve one `want` from its arrival until the lease has closed."""
    try:
        blocks = await lender.lend_prefix([BlockHash(block_hash) for block_hash in want.hashes])
    except Exception:  # whatever is wrong here: the reader is to know now, rather than to wait and blame us for it
        session.connection.send(Revoke(want.transfer_id, "nothing can be lent"))
        raise
    if not blocks:
        logger.debug("transfer %s: %s wants blocks, none is here", want.transfer_id.hex(), session.peer.peer_id)
        session.connection.send(Revoke(want.transfer_id, "none of these blocks is here"))
        return
    try:
        if not session.connection.is_open or want.transfer_id in session.leases:
            logger.warning("transfer %s: wanted, and gone before it was lent", want.transfer_id.hex())
            return
        lease = session.open_lease(want.transfer_id, len(blocks), want.request_id)
        lease.announce(0, blocks, last=True)
        outcome = await lease.closed
        transfer, wanted, reader = want.transfer_id.hex(), len(want.hashes), session.peer.peer_id
        logger.debug("transfer %s: lent %d of %d blocks to %s: %s", transfer, len(blocks), wanted, reader, outcome.name)
    finally:
        await lender.take_back(blocks)
