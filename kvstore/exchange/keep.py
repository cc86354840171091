"""Keeps blocks for a reader that is not known yet: a lease without its reader.

    keep (blocks, random id) -> the id travels to the reader by other ways -> take (id) -> lease over them, all
    announced at once -> lease closes -> over

One reader, once: what it does not confirm is not lent again. Where nobody comes in time, or the exchange closes, it is
over without a lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.errors import ProtocolViolation
from kvstore.exchange.connection import Connection
from kvstore.exchange.owner import Lease
from kvstore.protocol import AnnouncedBlock, LeaseOutcome, OwnerSession, Revoke


class Keep:
    """Blocks that whoever names `transfer_id` may read. They stay the keep's until `closed` resolves."""

    def __init__(self, transfer_id: bytes, blocks: Sequence[AnnouncedBlock], request_id: str) -> None:
        self.transfer_id = transfer_id
        self._blocks = blocks
        self._request_id = request_id
        self._closed: asyncio.Future[LeaseOutcome] = asyncio.get_running_loop().create_future()

    @property
    def closed(self) -> asyncio.Future[LeaseOutcome]:
        """Resolves, always, when the lease is over, or none will be, and nothing of ours touches the blocks."""
        return asyncio.shield(self._closed)

    def lend(self, connection: Connection[OwnerSession]) -> None:
        """Open the lease for the reader that has asked. Raises `ProtocolViolation` where it has one under this id."""
        try:
            lease = Lease(connection, self.transfer_id, len(self._blocks), self._request_id)
        except ValueError as error:
            self.end(LeaseOutcome.REVOKED)
            raise ProtocolViolation(str(error)) from error
        lease.closed.add_done_callback(lambda closed: self.end(closed.result()))
        lease.announce(0, self._blocks, last=True)

    def end(self, outcome: LeaseOutcome) -> None:
        self._closed.set_result(outcome)


class Keeps:
    """The keeps of one exchange that nobody has asked for yet."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, tuple[Keep, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, keep: Keep, timeout_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(timeout_s, self._end, keep.transfer_id, LeaseOutcome.EXPIRED)
        self._waiting[keep.transfer_id] = (keep, timer)

    def take(self, transfer_id: bytes, connection: Connection[OwnerSession]) -> None:
        """Lend a reader what it names, or tell it that there is nothing."""
        keep, timer = self._waiting.pop(transfer_id, (None, None))
        if keep is None or timer is None:
            connection.send(Revoke(transfer_id, "nothing is kept under this id"))
            return
        timer.cancel()
        keep.lend(connection)

    def close(self) -> None:
        for transfer_id in list(self._waiting):
            self._end(transfer_id, LeaseOutcome.REVOKED)

    def _end(self, transfer_id: bytes, outcome: LeaseOutcome) -> None:
        keep, timer = self._waiting.pop(transfer_id)
        timer.cancel()
        keep.end(outcome)
