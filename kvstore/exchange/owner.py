"""The shell around the owner's state machines: the leases of one connection, their timers, messages and sends."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Callable, Sequence

from kvstore.errors import ProtocolViolation
from kvstore.exchange.alarm import Alarm
from kvstore.exchange.connection import Connection
from kvstore.exchange.handshake import Introduction
from kvstore.exchange.observer import ExchangeObserver
from kvstore.protocol import (
    AbortSends,
    AnnouncedBlock,
    BlocksComputed,
    Closed,
    Confirm,
    Confirmed,
    ConfirmReceived,
    ExchangeTimeouts,
    Have,
    Heartbeat,
    LeaseAction,
    LeaseEvent,
    LeaseMachine,
    LeaseOutcome,
    LeaseTimer,
    Message,
    ReaderLost,
    ReadRefused,
    ReadRequest,
    ReadRequested,
    Release,
    ReleaseReceived,
    Renewed,
    Revoke,
    RevokeOrdered,
    SendEnded,
    SendMessage,
    StartSend,
    Suspect,
    Want,
)

logger = logging.getLogger(__name__)


class OwnerSession:
    """One reader's connection to us. Holds its open leases by transfer id."""

    def __init__(
        self,
        introduction: Introduction,
        connection: Connection,
        timeouts: ExchangeTimeouts,
        clock: Callable[[], float],
        observer: ExchangeObserver,
        on_want: Callable[[OwnerSession, Want], None] | None = None,
        on_have: Callable[[OwnerSession, Have], None] | None = None,
        on_suspect: Callable[[OwnerSession, Suspect], None] | None = None,
    ) -> None:
        self.peer = introduction.peer
        self.link = introduction.link
        self.transport_name = introduction.transport.name
        self.two_sided = introduction.transport.two_sided
        self.connection = connection
        self.leases: dict[bytes, Lease] = {}
        self.wants: set[bytes] = set()  # transfers that a prefix is being looked up or lent for
        self.timeouts = timeouts
        self.clock = clock
        self.observer = observer
        self._on_want = on_want
        self._on_have = on_have
        self._on_suspect = on_suspect

    def open_lease(self, transfer_id: bytes, num_blocks: int, request_id: str = "") -> Lease:
        """Open a lease, in the name of a request if it is one's, and offer it. Raises ValueError where the transfer has
        one.
        """
        if transfer_id in self.leases:
            raise ValueError(f"transfer {transfer_id.hex()} has a lease already")
        lease = Lease(self, transfer_id, num_blocks, request_id)
        self.leases[transfer_id] = lease
        lease.start()
        return lease

    def live_transfers(self) -> list[bytes]:
        """What our heartbeats name: nothing, since only readers renew leases."""
        return []

    def on_message(self, message: Message) -> None:
        """Handle a message of the reader's. Raises `ProtocolViolation`."""
        match message:
            case Heartbeat(transfer_ids):
                for transfer_id in transfer_ids:
                    if transfer_id in self.leases:
                        self.leases[transfer_id].handle(Renewed())
            case Want(transfer_id):
                if self._on_want is None:
                    self.connection.send(Revoke(transfer_id, "this worker lends no prefixes"))
                else:
                    self._on_want(self, message)
            case Have():
                if self._on_have is not None:  # else: we keep nothing for others, and nobody waits for an answer
                    self._on_have(self, message)
            case Suspect():
                if self._on_suspect is not None:
                    self._on_suspect(self, message)
            case ReadRequest() if not self.two_sided:
                raise ProtocolViolation(f"a read request over {self.transport_name}, which is one-sided")
            case ReadRequest(read_id, transfer_id, runs):
                if transfer_id in self.leases:
                    self.leases[transfer_id].handle(ReadRequested(read_id, runs))
                else:
                    self.connection.send(ReadRefused(read_id, "there is no such lease (any more)"))
            case Confirm(transfer_id):
                if transfer_id in self.leases:
                    self.leases[transfer_id].handle(ConfirmReceived())
                else:
                    self.connection.send(Confirmed(transfer_id, held=False))
            case Release(transfer_id, reason):
                if transfer_id in self.leases:
                    self.leases[transfer_id].handle(ReleaseReceived(reason))
            case _:
                raise ProtocolViolation(f"a reader sent {type(message).__name__}")

    def connection_lost(self, detail: str) -> None:
        """End all leases."""
        for lease in list(self.leases.values()):
            lease.handle(ReaderLost(detail))

    async def drained(self) -> None:
        """Wait until every lease has closed."""
        await asyncio.gather(*(lease.closed for lease in self.leases.values()))


class Lease:
    """Blocks that one reader may read. They stay the lease's until `closed` resolves; then the caller frees them."""

    def __init__(self, session: OwnerSession, transfer_id: bytes, num_blocks: int, request_id: str) -> None:
        self.transfer_id = transfer_id
        self.request_id = request_id  # for people
        self._context = contextvars.copy_context()  # what is logged of a transfer names the request that began it
        self._session = session
        self._opened_at = session.clock()
        self._machine = LeaseMachine(transfer_id, num_blocks, session.timeouts, self._opened_at)
        self._alarm = Alarm(session.clock, lambda: self.handle(LeaseTimer()))
        self._closed: asyncio.Future[LeaseOutcome] = asyncio.get_running_loop().create_future()

    @property
    def closed(self) -> asyncio.Future[LeaseOutcome]:
        """Resolves, always, when the lease is over and nothing of ours touches its blocks. Safe to cancel."""
        return asyncio.shield(self._closed)

    @property
    def state(self) -> str:
        """The name of the lease's state, for people."""
        return self._machine.state.value

    @property
    def num_announced(self) -> int:
        """Blocks announced so far."""
        return len(self._machine.blocks)

    def announce(self, first_index: int, blocks: Sequence[AnnouncedBlock], last: bool) -> None:
        """Tell the reader of newly computed blocks, in order; nothing happens once the lease is over.

        Raises ValueError for blocks out of order, too many, or a `last` that does not fit their number.
        """
        self.handle(BlocksComputed(first_index, blocks, last))

    def revoke(self, reason: str) -> None:
        """End the lease: the reader discards what it has. Nothing happens once the lease is over."""
        self.handle(RevokeOrdered(reason))

    def start(self) -> None:
        """Offer the lease to the reader; called once, by the session."""
        self._carry_out(self._machine.open())

    def handle(self, event: LeaseEvent) -> None:
        """Feed the machine and do what it says."""
        self._carry_out(self._machine.handle(event, self._session.clock()))

    def _carry_out(self, actions: list[LeaseAction]) -> None:
        self._alarm.set(self._machine.next_deadline)
        session = self._session
        for action in actions:
            match action:
                case SendMessage(message):
                    session.connection.send(message)
                case StartSend(read_id, runs):
                    self._send(read_id, runs)
                case AbortSends(reason):
                    session.connection.close(reason)  # the session's teardown aborts the link
                case Closed(outcome):
                    self._close(outcome)

    def _send(self, read_id: int, runs: tuple[tuple[int, int], ...]) -> None:
        sending: asyncio.Future[None]
        try:
            sending = self._session.link.serve(read_id, runs)
        except Exception as error:
            # Whatever a transport raises instead of returning a future: the send has ended, and badly.
            sending = asyncio.get_running_loop().create_future()
            sending.set_exception(error)
        sending.add_done_callback(functools.partial(self._send_ended, read_id))

    def _send_ended(self, read_id: int, done: asyncio.Future[None]) -> None:
        if (error := done.exception()) is not None:
            peer_id = self._session.peer.peer_id
            self._warn("transfer %s: a send to %s failed: %s", self.transfer_id.hex(), peer_id, error)
            self._session.connection.close(f"a send failed: {error}")
        self.handle(SendEnded(read_id))

    def _warn(self, message: str, *arguments: object) -> None:
        self._context.run(logger.warning, message, *arguments)

    def _close(self, outcome: LeaseOutcome) -> None:
        session = self._session
        del session.leases[self.transfer_id]
        duration_s = session.clock() - self._opened_at
        session.observer.lease_ended(session.peer.peer_id, outcome, self.num_announced, duration_s)
        if outcome in (LeaseOutcome.EXPIRED, LeaseOutcome.PEER_LOST):
            self._warn(
                "lease of transfer %s for %s ended after %.1f s: %s, %d of %d blocks announced",
                self.transfer_id.hex(),
                session.peer.peer_id,
                duration_s,
                outcome.value,
                self.num_announced,
                self._machine.num_blocks,
            )
        self._closed.set_result(outcome)
